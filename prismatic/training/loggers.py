"""Where a run's numbers go besides metrics.jsonl: TensorBoard, wandb, trackio, or nowhere. Optional packages, imported when asked for.

Surprising: TensorBoard's writer would load TensorFlow where that is installed, which aborts beside torch; it is told to use its own stub.
"""

import importlib
import os
import sys
import types
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prismatic.errors import ConfigError
from prismatic.normalize import ACTION_DIMENSIONS

PROJECT = "openvla"  # of wandb and trackio, where none is given
IDENTITY = (
    ".log_id"  # file in the run folder: the name that a tracker knows the run by, so that a resumed one goes on there
)


class NoLogger:
    """Writes nothing; the others override both methods."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, under names such as train/loss."""

    def close(self) -> None:
        """Send what is still to be sent."""


class TensorBoardLogger(NoLogger):
    """Event files in <run>/tensorboard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))  # see above
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier process logged past the checkpoint that the run goes on from
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class TrackerLogger(NoLogger):
    """wandb or trackio, whose calls are the same. `run`: what the package's init returned."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def check_installed(log_to: str) -> None:
    """ConfigError where the package isn't there, or doesn't import."""
    if log_to == "none":
        return
    try:
        importlib.import_module(log_to)
    except ImportError as error:
        raise ConfigError(
            f"--log_to {log_to} needs the package {log_to} ({error}): .venv/bin/pip install {log_to}, or leave the flag out "
            "(metrics.jsonl and curves.png are written anyway)"
        ) from None


def open_logger(log_to: str, folder: Path, *, options: Mapping[str, Any], first_step: int) -> NoLogger:
    """log_to: none, tensorboard, wandb or trackio; folder: the run's. A resumed run (first_step > 0) continues its log.

    options: the run's flags; its wandb_project and wandb_entity, and wandb's own environment, say where it is logged. ConfigError where the
    package is missing, or can't start.
    """
    check_installed(log_to)
    if log_to == "none":
        return NoLogger()
    if log_to == "tensorboard":
        return TensorBoardLogger(folder, first_step)
    known, project = _identity(folder), options.get("wandb_project") or os.environ.get("WANDB_PROJECT", PROJECT)
    how: dict[str, Any] = {"project": project, "name": f"{folder.name}-{known}"}
    if log_to == "wandb":
        how = {"project": project, "entity": options.get("wandb_entity"), "name": folder.name, "id": known, "dir": str(folder)}  # fmt: skip
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}
    try:
        return TrackerLogger(importlib.import_module(log_to).init(**how, config=plain, resume="allow"))
    except Exception as error:  # each has its own for no login, no network, an unwritable folder
        raise ConfigError(
            f"--log_to {log_to} can't start ({(str(error) or type(error).__name__).splitlines()[0]}): log in first, set WANDB_MODE=offline "
            "for wandb without a network, or leave the flag out"
        ) from None


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of metrics.jsonl as names that trackers group: train/loss, val/l1_loss, val/l1_loss_per_dimension/gripper."""
    named: dict[str, float] = {}
    for name, value in row.items():
        group = f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"
        if isinstance(value, list):
            of_an_arm = len(value) == len(ACTION_DIMENSIONS)
            named |= {f"{group}/{ACTION_DIMENSIONS[i] if of_an_arm else i}": number for i, number in enumerate(value)}
        elif isinstance(value, int | float) and name != "step":
            named[group] = value
    return named


def _identity(folder: Path) -> str:
    path = folder / IDENTITY
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
