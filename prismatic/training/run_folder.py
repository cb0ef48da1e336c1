"""A training run on disk: step folders that are whole or not there, metrics.jsonl, and the state that a resumed run needs.

    <run>/step-001000/   an adapter folder (or a checkpoint folder), training_state.pt, metrics.jsonl up to there, SHA256SUMS of all
    <run>/latest         a link to the newest step folder
    <run>/best           a link to the one that validated best, best.json its step and value; it is never deleted
    <run>/metrics.jsonl  a line a logged step
    <run>/skipped.jsonl  a line a step that was skipped, as its loss or gradient was not finite, with the frames of its batch

Surprising: on resuming, metrics.jsonl is cut back to the checkpoint, so that no step stands in it twice. A step folder that was damaged after
it was written is set aside as damaged-step-…, and the one before it takes its place.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import torch

from prismatic.atomic import flush, lock, sweep, whole_folder, write_json, write_whole, writing_to
from prismatic.errors import ConfigError
from prismatic.filenames import BEST, BEST_VALUE, LATEST, METRICS, OPTIONS, STEP, STEP_FOLDER, SUMS, TRAINING_STATE
from prismatic.ranges import Count
from prismatic.records import read_object, read_record
from prismatic.sums import read_sums, sha256, write_sums
from prismatic.training.distributed import SINGLE_PROCESS, Ranks

IDENTITY = ("base", "data", "samples", "states")  # of Task.identity: they are no flags


class Best(TypedDict):
    """The checkpoint that validated best."""

    step: Count
    value: float


class RunFolder:
    """One run's folder, made if it isn't there; the `keep` newest step folders stay, and the best.

    Of several ranks only the main process locks it, and only that one may call what writes.
    """

    def __init__(self, path: Path, *, keep: int, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.path, self.keep = path, keep
        ranks.on_main_process(self._take)

    def _take(self) -> None:
        """Lock the folder, and clear away what a killed run was writing."""
        with writing_to(self.path, "another --run_root_dir"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
            lock(self._lock, f"{self.path} is being trained by another process: wait, or give a --run_id_note")
            sweep(self.path)

    def checkpoints(self) -> list[Path]:
        """Step folders, oldest first."""
        folders = [path for path in self.path.glob("step-*") if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
        return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))

    def check_options(self, options: Mapping[str, Any], *, may_change: tuple[str, ...]) -> None:
        """Remember the options of the run; ConfigError that names the first one that differs from what its saved steps learnt with."""
        path, options = self.path / OPTIONS, json.loads(json.dumps(options, default=str))
        if self.checkpoints():
            before = read_object(path if path.exists() else self.path / LATEST / OPTIONS)
            for name, value in options.items():
                if name not in may_change and name in before and _plain(before[name]) != _plain(value):
                    given = f"other {name}" if name in IDENTITY else f"--{name} {before[name]}, not {value}"
                    way_out = "give that, or a --run_id_note to begin another run"
                    raise ConfigError(f"{self.path} was begun with {given}: {way_out}")
        write_json(path, options)

    def save(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> Path:
        """Make step-<step> from what `write` puts into a folder, add the state, then link it and delete the oldest."""
        folder = self.folder(step)
        with whole_folder(folder) as unfinished:
            write(unfinished)
            try:
                torch.save(dict(state), unfinished / TRAINING_STATE)
            except RuntimeError as error:  # of a full disk torch says that its file's position is unexpected
                if "inline_container" not in str(error):
                    raise
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            for name in (METRICS, OPTIONS):
                if (self.path / name).exists() and not (unfinished / name).exists():
                    shutil.copyfile(self.path / name, unfinished / name)
            write_sums(unfinished, unfinished.iterdir())
        self._link(LATEST, folder)
        flush(self.path)
        self._delete_old()
        return folder

    def _link(self, name: str, folder: Path) -> None:
        link = self.path / f".{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        there = self.path / name
        if there.is_dir() and not there.is_symlink():  # a copy that followed links made a folder of it
            shutil.rmtree(aside := there.with_name(f"{name}-copied"), ignore_errors=True)
            there.rename(aside)
            print(f"notice: {there} was a folder and is a link again; what it held is now {aside.name}")
        link.replace(there)

    def _delete_old(self) -> None:
        best = self.best()
        for old in self.checkpoints()[: -self.keep]:
            if best is None or old != self.folder(best["step"]):
                old.unlink() if old.is_symlink() else shutil.rmtree(old)

    def mark_best(self, step: int, value: float) -> None:
        """Keep the saved step folder of `step` for its value on validation; the one that was best till now goes the usual way."""
        write_json(self.path / BEST_VALUE, {"step": step, "value": value})
        self._link(BEST, self.folder(step))
        self._delete_old()

    def best(self) -> Best | None:
        """What mark_best was last told; None where nothing is marked, or the folder is gone."""
        path = self.path / BEST_VALUE
        if not path.exists():
            return None
        best: Best = read_record(path, Best)
        return best if self.folder(best["step"]).is_dir() else None

    def is_best(self, value: float) -> bool:
        """Whether a value on validation is better than that of the best checkpoint, if there is one."""
        best = self.best()
        return math.isfinite(value) and (best is None or value < best["value"])

    def folder(self, step: int) -> Path:
        """Where a step is saved."""
        return self.path / STEP.format(step)

    def newest_whole(self) -> Path | None:
        """The step folder to go on from; newer ones that are damaged are set aside. None in a new run; ConfigError where none is whole."""
        damaged = {}
        for folder in reversed(self.checkpoints()):
            if reason := _damage(folder):
                damaged[folder] = reason
                continue
            for bad, reason in damaged.items():
                aside = bad.with_name(f"damaged-{bad.name}")
                shutil.rmtree(aside, ignore_errors=True)
                bad.rename(aside)
                print(f"notice: {bad} is damaged ({reason}): it is now {aside.name}, and {folder.name} takes its place")
            self._link(LATEST, folder)
            return folder
        if damaged:
            bad, reason = next(iter(damaged.items()))
            raise ConfigError(
                f"{bad} is damaged ({reason}), and no other step folder is whole: delete {self.path} to begin again"
            )
        return None

    def cut_metrics(self, folder: Path | None) -> None:
        """Take metrics.jsonl back to what a step folder holds; None: to nothing."""
        if folder is not None and (folder / METRICS).exists():
            write_whole(self.path / METRICS, (folder / METRICS).read_bytes())
        else:
            (self.path / METRICS).unlink(missing_ok=True)

    def log(self, row: Mapping[str, Any], name: str = METRICS) -> None:
        """Append a line to metrics.jsonl, or to another file of its kind; NaN and infinity, which are no JSON, as null."""
        line = msgspec.json.format(msgspec.json.encode(row), indent=0)
        with writing_to(self.path), (self.path / name).open("ab") as stream:
            stream.write(line + b"\n")


def _plain(value: Any) -> Any:
    """An option as it is compared: a name or path that ends in / is the same without it."""
    return value.rstrip("/") if isinstance(value, str) else value


def _damage(folder: Path) -> str | None:
    """What is wrong with a step folder; None if every file is as it was written."""
    try:
        sums = read_sums(folder)
        changed = [name for name, digest in sums.items() if sha256(folder / name) != digest]
    except ConfigError as error:
        return str(error).removeprefix(f"{folder}/").partition(":")[0]
    if changed:
        return f"{changed[0]} is not as it was written"
    return None if TRAINING_STATE in sums else f"{SUMS} is cut off"
