"""The one writer of frame caches, used by every format: episodes in, the three files that `frames.FrameCache` opens out.

An image's bytes are written as they come, each with a checksum that is compared whenever it is read; `steps.npz` holds a digest of `meta.json`, and
its own arrays are checked by the zip format. A cache is there whole or not at all: what is half-written lies in a hidden folder
beside it, locked by its writer, so that the next call can tell it from one whose writer was killed.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.data.cache_files import CACHE_FORMAT, OLD_FORMAT, CacheMeta, meta_digest
from prismatic.data.dataset_folder import listing
from prismatic.data.gripper import detect_gripper
from prismatic.data.staging import writing_to
from prismatic.errors import ConfigError
from prismatic.filenames import CACHE_FRAMES, CACHE_META, CACHE_STEPS, STAGED_NOTE, UNFINISHED
from prismatic.records import read_object

VIEWS = ("image", "wrist_image")  # their order in frames.bin; the second may be missing
LOCK = "writer.lock"


class CacheWriter:
    """Write a cache into an empty folder: `add` each episode, `finish` once. Memory holds numbers only, no images."""

    def __init__(self, folder: Path, *, name: str, source: str = "", has_wrist: bool = True) -> None:
        self._folder, self._name, self._source = Path(folder), name, source
        self._views = VIEWS[: 1 + has_wrist]
        self._frames = (self._folder / CACHE_FRAMES).open("wb")
        self._columns: dict[str, list[np.ndarray]] = {"action": [], "episode": [], "timestep": [], "instruction": []}
        self._sizes: list[int] = []
        self._crc: list[int] = []
        self._instructions: dict[str, int] = {}
        self._file_paths: list[str] = []
        self._content = hashlib.blake2b(digest_size=16)

    def add(
        self,
        images: Iterable[Sequence[bytes]],
        *,
        action: np.ndarray,
        instructions: Sequence[str],
        state: np.ndarray | None = None,
        file_path: str = "",
    ) -> None:
        """An episode of T steps: per step its JPEG views, actions (T, D) as recorded, instructions T, states (T, K) or None.

        images may be an iterator: each step is written as it comes. ConfigError for NaN and infinity; ValueError where the lengths don't agree.
        """
        steps, where = len(action), f"episode {len(self._file_paths) + 1} of {self._source or self._name}"
        columns = {"action": np.asarray(action)} | ({} if state is None else {"state": np.asarray(state)})
        for field, values in columns.items():
            if values.ndim != 2 or not np.isfinite(values).all():
                raise ConfigError(
                    f"{field} of {where} holds NaN or infinity, or no vectors: repair or drop that episode"
                )
            self._columns.setdefault(field, []).append(values.astype(np.float32))
        written = 0
        for views in images:
            for jpeg in views:
                self._frames.write(jpeg)
                self._content.update(jpeg)
                self._sizes.append(len(jpeg))
                self._crc.append(zlib.crc32(jpeg))
            written += len(views)
        if written != steps * len(self._views) or len(instructions) != steps:
            raise ValueError(f"{where}: {written} images and {len(instructions)} instructions for {steps} steps")
        self._content.update(self._columns["action"][-1].tobytes())
        self._content.update("\0".join(instructions).encode())
        number = len(self._file_paths)
        self._columns["episode"].append(np.full(steps, number, dtype=np.int32))
        self._columns["timestep"].append(np.arange(steps, dtype=np.int32))
        numbers = [self._instructions.setdefault(text, len(self._instructions)) for text in instructions]
        self._columns["instruction"].append(np.array(numbers, dtype=np.int32))
        self._file_paths.append(file_path)

    def finish(
        self,
        *,
        train_episodes: int | None = None,
        action_names: Sequence[str] = (),
        fps: float | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Write the numbers and the description. train_episodes: how many come before the validation split; None where there is none.

        action_names: of each dimension, where the data set has them. notes: sentences about how the data set was read.
        """
        if not self._sizes:
            raise ConfigError(f"{self._source or self._name} has no episode with a step: give a data set that has some")
        self._frames.close()
        arrays = {key: np.concatenate(parts) for key, parts in self._columns.items()}
        gripper = detect_gripper(arrays["action"], action_names)
        meta = CacheMeta(
            format=CACHE_FORMAT,
            name=self._name,
            source=self._source,
            fingerprint=self._content.hexdigest(),
            train_episodes=train_episodes,
            images=list(self._views),
            instructions=list(self._instructions),
            file_paths=self._file_paths,
            gripper=gripper,
            action_names=list(action_names),
            fps=fps,
            notes=list(notes),
        )
        text = json.dumps(dataclasses.asdict(meta), indent=1)
        (self._folder / CACHE_META).write_text(text)
        offsets = np.cumsum([0, *self._sizes])
        checks = {"crc": np.array(self._crc, dtype=np.uint32), "meta_digest": meta_digest(text.encode())}
        np.savez(self._folder / CACHE_STEPS, allow_pickle=False, offsets=offsets, **checks, **arrays)


def cached(cache_dir: Path, name: str, identity: Any, fill: Callable[[Path], None]) -> Path:
    """The folder `cache_dir/name-<key of identity>`, filled by `fill` where it isn't there yet. identity: JSON-ready, what the content depends on."""
    cache_dir = Path(cache_dir).absolute()
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, identity]).encode()).hexdigest()
    cache = cache_dir / f"{name}-{key[:12]}"
    if (cache / CACHE_META).is_file():
        return cache
    with unfinished(cache_dir) as folder:
        fill(folder)
        with writing_to(cache_dir):
            try:
                folder.rename(cache)
            except OSError:
                if not (cache / CACHE_META).is_file():  # else another process was quicker: its is as good
                    raise
    _delete_older(cache, name)
    return cache


def _delete_older(cache: Path, name: str) -> None:
    """Delete what an earlier format made of the same source: nothing opens it any more."""
    source = read_object(cache / CACHE_META).get("source")
    for meta in cache.parent.glob(f"{glob.escape(name)}-*/{CACHE_META}"):
        with contextlib.suppress(ConfigError):
            found = read_object(meta)
            if source and found.get("source") == source and found.get("format") == OLD_FORMAT:
                shutil.rmtree(meta.parent, ignore_errors=True)


def made_of_staged(
    episodes: Path, target: Path, fill: Callable[[Path, Sequence[Path]], Path], *, fps: float | None = None
) -> Path:
    """The data set `target` of a folder's staged episodes, made by `fill` (folder to write in, episodes → what it made) unless it holds just these.

    What an earlier call wrote is replaced. ConfigError where there is no episode, or a data set from elsewhere in the way.
    """
    paths = sorted(Path(episodes).absolute().glob("*.npz"))
    if not paths:
        raise ConfigError(f"{episodes} holds no finished episode (*.npz): collect at least one first")
    note = json.dumps(listing(paths) if fps is None else [fps, listing(paths)])
    if target.exists():
        if not (target / STAGED_NOTE).is_file():
            raise ConfigError(f"{target} is a data set from elsewhere and is kept: give another output or name")
        if (target / STAGED_NOTE).read_text() == note:
            return target
    with unfinished(target.parent) as folder, writing_to(target.parent):
        made = fill(folder, paths)
        (made / STAGED_NOTE).write_text(note)
        if target.exists():
            target.rename(folder.parent / "replaced")
        made.rename(target)
    return target


@contextlib.contextmanager
def unfinished(parent: Path) -> Iterator[Path]:
    """A new folder inside a hidden one in `parent`, which goes away in the end, whatever happens; so do those of killed writers."""
    with writing_to(parent):
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        hidden = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=parent))
        folder = hidden / "new"
        folder.mkdir()  # with the usual permissions, unlike the hidden one
        lock = (hidden / LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        lock.close()


def _sweep(parent: Path) -> None:
    """Delete what writers left behind that are no more: nobody holds its lock."""
    for path in parent.glob(f"{UNFINISHED}*/{LOCK}"):
        with contextlib.suppress(OSError), path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
