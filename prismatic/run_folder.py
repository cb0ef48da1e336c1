"""A training run on disk: step folders that are whole or not there, metrics.jsonl, and the state that a resumed run needs.

    <run>/step-001000/   an adapter folder (or a checkpoint folder), training_state.pt, metrics.jsonl up to there
    <run>/latest         a link to the newest step folder
    <run>/metrics.jsonl  a line a logged step

Surprising: on resuming, metrics.jsonl is cut back to the checkpoint, so that no step stands in it twice.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from prismatic.errors import ConfigError

STEP_FOLDER = re.compile(r"latest|step-\d+")  # names within a run: the run's own name says more
STATE, METRICS, LATEST, OPTIONS = "training_state.pt", "metrics.jsonl", "latest", "finetune.json"


class RunFolder:
    """One run's folder, made if it isn't there; the `keep` newest step folders stay."""

    def __init__(self, path: Path, *, keep: int) -> None:
        self.path, self.keep = path, keep
        path.mkdir(parents=True, exist_ok=True)

    def checkpoints(self) -> list[Path]:
        """Step folders, oldest first."""
        return sorted(folder for folder in self.path.glob("step-*") if STEP_FOLDER.fullmatch(folder.name))

    def check_options(self, options: Mapping[str, Any], *, may_change: tuple[str, ...]) -> None:
        """Remember the options of the run; ConfigError that names the first one that differs from what it began with."""
        path = self.path / OPTIONS
        if path.exists():
            before = json.loads(path.read_text())
            for name, value in json.loads(json.dumps(options, default=str)).items():
                if name not in may_change and name in before and before[name] != value:
                    raise ConfigError(
                        f"{self.path} was begun with --{name} {before[name]}, not {value}: "
                        "give that, or a --run_id_note to begin another run"
                    )
        path.write_text(json.dumps(options, indent=2, default=str))

    def save(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> Path:
        """Make step-<step> from what `write` puts into a folder, add the state, then link it and delete the oldest."""
        folder = self.path / f"step-{step:06d}"
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
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise ConfigError(
                f"{folder} can't be saved ({error}): free some space; what was saved before is whole"
            ) from None
        link = self.path / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.replace(self.path / LATEST)
        for old in self.checkpoints()[: -self.keep]:
            shutil.rmtree(old)
        return folder

    def load_state(self, folder: Path) -> dict[str, Any]:
        """The training state of a step folder; also cuts metrics.jsonl back to it."""
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        if (folder / METRICS).exists():
            shutil.copyfile(folder / METRICS, self.path / METRICS)
        return state

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with (self.path / METRICS).open("a") as stream:
            stream.write(json.dumps(row) + "\n")
