"""The one writer of frame caches, used by every format: episodes in, the three files that `frames.FrameCache` opens out.

An image's bytes are written as they come, each with a checksum that is compared whenever it is read; `steps.npz` holds a digest of `meta.json`, and
its own arrays are checked by the zip format.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from prismatic.data.cache_files import CACHE_FORMAT, CacheMeta, meta_digest
from prismatic.data.gripper import detect_gripper
from prismatic.errors import ConfigError
from prismatic.filenames import CACHE_FRAMES, CACHE_META, CACHE_STEPS

VIEWS = ("image", "wrist_image")  # their order in frames.bin; the second may be missing


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
