"""A training run on disk: step folders that are whole or not there, metrics.jsonl, and the state that a resumed run needs.

    <run>/step-001000/   an adapter folder (or a checkpoint folder), training_state.pt, metrics.jsonl up to there
    <run>/latest         a link to the newest step folder
    <run>/best           a link to the one that validated best, best.json its step and value; it is never deleted
    <run>/metrics.jsonl  a line a logged step

Surprising: on resuming, metrics.jsonl is cut back to the checkpoint, so that no step stands in it twice.
"""

import fcntl
import json
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from prismatic.errors import ConfigError, read_json

STEP_FOLDER = re.compile(r"latest|best|step-\d+")  # names within a run: the run's own name says more
STATE, METRICS, LATEST, OPTIONS = "training_state.pt", "metrics.jsonl", "latest", "finetune.json"
BEST, BEST_VALUE = "best", "best.json"


class Best(NamedTuple):
    """The checkpoint that validated best."""

    step: int
    value: float


class RunFolder:
    """One run's folder, made if it isn't there; the `keep` newest step folders stay, and the best."""

    def __init__(self, path: Path, *, keep: int) -> None:
        self.path, self.keep = path, keep
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path} is being trained by another process: wait, or give a --run_id_note") from None
        except OSError as error:
            raise ConfigError(
                f"--run_root_dir {path.parent} can't be written ({error.strerror}): give another"
            ) from None

    def checkpoints(self) -> list[Path]:
        """Step folders, oldest first."""
        folders = [folder for folder in self.path.glob("step-*") if STEP_FOLDER.fullmatch(folder.name)]
        return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))

    def check_options(self, options: Mapping[str, Any], *, may_change: tuple[str, ...]) -> None:
        """Remember the options of the run; ConfigError that names the first one that differs from what it began with."""
        path = self.path / OPTIONS
        if path.exists():
            before = read_json(path)
            for name, value in json.loads(json.dumps(options, default=str)).items():
                if name not in may_change and name in before and before[name] != value:
                    raise ConfigError(
                        f"{self.path} was begun with --{name} {before[name]}, not {value}: "
                        "give that, or a --run_id_note to begin another run"
                    )
        self._replace(OPTIONS, json.dumps(options, indent=2, default=str))

    def save(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> Path:
        """Make step-<step> from what `write` puts into a folder, add the state, then link it and delete the oldest."""
        folder = self.folder(step)
        unfinished = self.path / f".unfinished-{folder.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            write(unfinished)
            torch.save(dict(state), unfinished / STATE)
            if (self.path / METRICS).exists():
                shutil.copyfile(self.path / METRICS, unfinished / METRICS)
            if folder.exists():
                shutil.rmtree(folder)
            unfinished.rename(folder)
        except (OSError, SafetensorError, RuntimeError) as error:  # the last two: safetensors and torch on a full disk
            raise ConfigError(
                f"{folder} can't be saved ({error}): free some space; what was saved before is whole"
            ) from None
        finally:
            for left in self.path.glob(f"{unfinished.name}*"):
                shutil.rmtree(left, ignore_errors=True)
        self._link(LATEST, folder)
        self._delete_old()
        return folder

    def _link(self, name: str, folder: Path) -> None:
        link = self.path / f".{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.replace(self.path / name)

    def _delete_old(self) -> None:
        best = self.best()
        for old in self.checkpoints()[: -self.keep]:
            if best is None or old != self.folder(best.step):
                shutil.rmtree(old)

    def mark_best(self, step: int, value: float) -> None:
        """Keep the saved step folder of `step` for its value on validation; the one that was best till now goes the usual way."""
        folder = self.folder(step)
        if not folder.is_dir():
            raise ValueError(f"step {step} is not saved: save it, then mark it")
        self._replace(BEST_VALUE, json.dumps({"step": step, "value": value}))
        self._link(BEST, folder)
        self._delete_old()

    def best(self) -> Best | None:
        """What mark_best was last told; None where nothing is marked, or the folder is gone."""
        path = self.path / BEST_VALUE
        if not path.exists():
            return None
        best = Best(**read_json(path))
        return best if self.folder(best.step).is_dir() else None

    def folder(self, step: int) -> Path:
        """Where a step is saved."""
        return self.path / f"step-{step:06d}"

    def _replace(self, name: str, text: str) -> None:
        """A file that is there whole, new or old, at any moment."""
        unfinished = self.path / f".unfinished-{name}"
        unfinished.write_text(text)
        unfinished.replace(self.path / name)

    def load_state(self, folder: Path) -> dict[str, Any]:
        """The training state of a step folder; also cuts metrics.jsonl back to it. ConfigError if the state is damaged."""
        try:
            state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"{folder / STATE} is damaged ({first}): delete {folder} to go on from the one before"
            ) from None
        self.cut_metrics(folder)
        return state

    def cut_metrics(self, folder: Path | None) -> None:
        """Take metrics.jsonl back to what a step folder holds; None: to nothing."""
        (self.path / METRICS).unlink(missing_ok=True)
        if folder is not None and (folder / METRICS).exists():
            shutil.copyfile(folder / METRICS, self.path / METRICS)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with (self.path / METRICS).open("a") as stream:
            stream.write(json.dumps(row) + "\n")
