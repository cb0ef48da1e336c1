"""Where a run's numbers go besides metrics.jsonl: TensorBoard, wandb, trackio, or nowhere. Optional packages, imported when asked for.

Surprising: TensorBoard's writer would load TensorFlow where that is installed, which aborts beside torch; it is told to use its own stub.
"""

import importlib
import os
import sys
import types
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismatic.errors import ConfigError
from prismatic.normalize import ACTION_DIMENSIONS

PROJECT = "openvla"  # of wandb and trackio, where none is given
IDENTITY = ".log_id"  # file in a run's folder: the name that a tracker knows it by, so that a resumed one goes on there
FLUSH_SECONDS = 10  # of TensorBoard's file


@dataclass(frozen=True)
class Logger:
    """Takes the numbers of a step, under names such as train/loss, and at the end sends what is still to be sent; as it is, nowhere."""

    log: Callable[[int, dict[str, float]], object] = lambda step, values: None
    close: Callable[[], object] = lambda: None


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


def open_logger(log_to: str, folder: Path, *, options: Mapping[str, Any], first_step: int) -> Logger:
    """log_to: none, tensorboard, wandb or trackio, installed; folder: the run's. A resumed run (first_step > 0) continues its log.

    options: the run's flags; its wandb_project and wandb_entity, and wandb's own environment, say where it is logged. ConfigError where the
    package can't start.
    """
    if log_to == "none":
        return Logger()
    if log_to == "tensorboard":
        return _tensorboard(folder / "tensorboard", first_step)
    identity = folder / IDENTITY
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:12])
    known, project = identity.read_text(), options.get("wandb_project") or os.environ.get("WANDB_PROJECT", PROJECT)
    how: dict[str, Any] = {"name": f"{folder.name}-{known}"}
    if log_to == "wandb":
        how = {"entity": options.get("wandb_entity"), "name": folder.name, "id": known, "dir": str(folder)}
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}
    try:
        run = importlib.import_module(log_to).init(**how, project=project, config=plain, resume="allow")
    except Exception as error:  # each has its own for no login, no network, an unwritable folder
        raise ConfigError(
            f"--log_to {log_to} can't start ({(str(error) or type(error).__name__).splitlines()[0]}): log in first, set WANDB_MODE=offline "
            "for wandb without a network, or leave the flag out"
        ) from None
    return Logger(lambda step, values: run.log(values, step=step), run.finish)


def _tensorboard(folder: Path, first_step: int) -> Logger:
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))  # see above
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an earlier process logged past the checkpoint that the run goes on from
    writer = SummaryWriter(str(folder), purge_step=first_step + 1, flush_secs=FLUSH_SECONDS)
    return Logger(lambda step, values: [writer.add_scalar(*point, step) for point in values.items()], writer.close)


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
