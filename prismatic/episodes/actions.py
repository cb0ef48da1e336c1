"""The actions of each episode, step by step: a small file beside the results, and lines for the report to draw."""

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np

from prismatic.arrays import read_arrays
from prismatic.atomic import write_whole

FOLDER = "actions"  # within a rollout folder; an episode takes about 5 KB
DIMENSIONS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
GRIPPER = DIMENSIONS.index("gripper")  # 1 open … 0 close
MOST_POINTS = 110  # of a line in the report: more could not be told apart, and 500 episodes share one page


def save(folder: Path, episode_id: str, actions: np.ndarray) -> str:
    """Write (steps, 7) float32 to actions/<episode>.npz and return that name. ConfigError when it cannot be written.

    The name is the episode's own, so an episode played again replaces what an interrupted call may have left.
    """
    name = f"{FOLDER}/{episode_id.replace('/', '-')}.npz"
    stream = io.BytesIO()
    np.savez_compressed(stream, actions=actions.astype(np.float32))
    (folder / FOLDER).mkdir(exist_ok=True)
    write_whole(folder / name, stream.getvalue())
    return name


def load(folder: Path, name: str | None) -> np.ndarray | None:
    """(steps, 7) float32; None where an older run kept none, or the file is gone or damaged: a report does without."""
    if not name or not (folder / name).is_file():
        return None
    try:
        actions = read_arrays(folder / name)["actions"]
    except (OSError, EOFError, TypeError, ValueError, KeyError, zlib.error, zipfile.BadZipFile):
        return None
    return actions if actions.ndim == 2 and actions.shape[1] == len(DIMENSIONS) else None


def line(values: np.ndarray, *, width: int, height: int, limit: float) -> str:
    """An SVG path in a box of width × height: first to last of `values` from left to right, limit at the top, -limit at the bottom."""
    chosen = np.unique(np.linspace(0, len(values) - 1, min(len(values), MOST_POINTS)).round().astype(int))
    across = np.round(chosen / max(len(values) - 1, 1) * width).astype(int)
    clipped = np.clip(np.nan_to_num(values[chosen]) / limit, -1, 1)
    down = np.round((1 - clipped) / 2 * height).astype(int)
    steps = zip(np.diff(across), np.diff(down), strict=True)
    return f"M{across[0]} {down[0]}" + "".join(f"l{dx} {dy}" for dx, dy in steps)
