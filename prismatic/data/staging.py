"""Staged episodes: an .npz file per finished demonstration; `rlds.write_dataset` or `lerobot_writer.write_dataset` makes a data set of them.

A file is there whole or not at all, so that collecting can go on after any interruption.
"""

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prismatic.arrays import read_arrays
from prismatic.atomic import flush, writing_to
from prismatic.errors import ConfigError
from prismatic.filenames import UNFINISHED

STAGED = "_staged"  # what the folder of collect.py's episodes, beside its data set, adds to that one's name


class StagedEpisode(NamedTuple):
    """A demonstration of T ≥ 1 steps, its frames as JPEG."""

    images: Sequence[bytes]  # T agent views, upright
    action: np.ndarray  # (T, D) float32; LIBERO's as it takes it: gripper -1 open, +1 close
    instruction: str
    wrist_images: Sequence[bytes] = ()  # T wrist views, upright; none where there is no such camera
    state: np.ndarray | None = None  # (T, S) float32; LIBERO's: end effector's position 3, axis-angle 3, fingers 2
    joint_state: np.ndarray | None = None  # (T, joints) float32
    file_path: str = ""  # where the demonstration came from


def stage_episode(path: Path, **fields: Any) -> None:
    """Write an episode, whose fields are StagedEpisode's, as `path`, an .npz whose name decides its place in the data set.

    ValueError where the fields don't agree in length; ConfigError where the disk is full.
    """
    episode = StagedEpisode(**fields)
    images, wrist_images = episode.images, episode.wrist_images
    vectors = {name: getattr(episode, name) for name in ("action", "state", "joint_state")}
    numbers = {name: np.asarray(values, dtype=np.float32) for name, values in vectors.items() if values is not None}
    shapes = {name: values.shape for name, values in numbers.items()}
    views = (len(images),), (len(wrist_images) or len(images),)
    lengths = {*views, *(shape[:1] for shape in shapes.values())}
    if len(images) == 0 or len(lengths) > 1 or any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
        raise ValueError(f"an episode of {len(images)} images and {len(wrist_images)} wrist images, arrays {shapes}")
    content = {
        "image_jpeg": np.frombuffer(b"".join(images), dtype=np.uint8),
        "image_offsets": np.cumsum([0, *map(len, images)]),
        "wrist_jpeg": np.frombuffer(b"".join(wrist_images), dtype=np.uint8),
        "wrist_offsets": np.cumsum([0, *map(len, wrist_images)]),
        "instruction": np.array(episode.instruction),
        "file_path": np.array(episode.file_path),
        **numbers,
    }
    path = Path(path)
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as folder:
            np.savez(Path(folder) / path.name, allow_pickle=False, **content)
            flush(Path(folder) / path.name)
            (Path(folder) / path.name).replace(path)


def load_episode(path: Path) -> StagedEpisode:
    """What `stage_episode` wrote; ConfigError for a damaged file."""
    try:
        staged = read_arrays(path)
        images, wrist_images = (
            [staged[f"{view}_jpeg"][start:end].tobytes() for start, end in pairwise(staged[f"{view}_offsets"].tolist())]
            for view in ("image", "wrist")
        )
        words, source = str(staged["instruction"]), str(staged["file_path"])
        states = staged.get("state"), staged.get("joint_state")
        return StagedEpisode(images, staged["action"], words, wrist_images, *states, source)
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        raise ConfigError(f"the staged episode {path} is damaged ({error}): delete it and go on") from None
