"""The description and the numbers of a frame cache, read and checked; `data/writer.py` writes them, `frames.py` says what they are."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta

from prismatic.arrays import read_arrays
from prismatic.errors import ConfigError
from prismatic.filenames import CACHE_FRAMES, CACHE_META, CACHE_STEPS
from prismatic.normalize import LIBERO_GRIPPER, Gripper
from prismatic.ranges import Count
from prismatic.records import parse_record, read_bytes

CACHE_FORMAT = 2  # open_cache makes a new one where there is another
OLD_FORMAT = 1  # is read too: RLDS in LIBERO's convention, without checksums
COLUMNS = {"action", "episode", "timestep", "instruction"}  # a row a step in steps.npz; there may be state, too
AGAIN = "delete it and run again"


@dataclass
class CacheMeta:
    """meta.json of a cache. The defaults are those of the old format."""

    format: int
    name: str
    fingerprint: str  # of the content, the same on every machine
    images: Annotated[list[str], Meta(min_length=1, max_length=2)]  # names of the views
    instructions: list[str]  # the distinct ones
    file_paths: list[str]  # an episode each
    train_episodes: Count | None = None  # how many come before the validation split; None where the data set has none
    source: str = ""  # where the data set lay
    gripper: Gripper = LIBERO_GRIPPER
    action_names: list[str] = field(default_factory=list)  # of each dimension; empty where the data set doesn't say
    in_order: bool = False  # episodes stand as they were recorded, task after task, not in RLDS' order by a hash: what is held out is drawn
    fps: float | None = None
    notes: list[str] = field(default_factory=list)  # how the data set was read, a sentence each


def meta_digest(meta: bytes) -> np.ndarray:
    """(16,) uint8: the checksum of meta.json that steps.npz holds."""
    return np.frombuffer(hashlib.blake2b(meta, digest_size=16).digest(), dtype=np.uint8)


def read_cache(folder: Path) -> tuple[CacheMeta, dict[str, np.ndarray]]:
    """What meta.json and steps.npz hold. ConfigError where the folder is no whole cache of a known format."""
    text = read_bytes(folder / CACHE_META, way_out=AGAIN)
    meta = parse_record(text, CacheMeta, str(folder / CACHE_META), way_out=AGAIN)
    try:
        steps = read_arrays(folder / CACHE_STEPS)
        unchanged = meta.format == OLD_FORMAT or (steps["meta_digest"] == meta_digest(text)).all()
        whole = unchanged and (folder / CACHE_FRAMES).stat().st_size == steps["offsets"][-1] and steps.keys() >= COLUMNS
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        raise ConfigError(f"{folder} is no frame cache ({error}): {AGAIN}") from None
    if not whole or meta.format not in (OLD_FORMAT, CACHE_FORMAT):
        raise ConfigError(f"the frame cache {folder} is old or damaged: {AGAIN}")
    return meta, steps
