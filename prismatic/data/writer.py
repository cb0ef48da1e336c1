"""The one writer of frame caches, used by every format: episodes in, the three files that `frames.FrameCache` opens out.

An image that is a JPEG is written as it comes; another becomes one. Each has a checksum that is compared whenever it is read; `steps.npz` holds a
digest of `meta.json`, and its own arrays are checked by the zip format.
"""

import dataclasses
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prismatic.data.cache_files import CACHE_FORMAT, CacheMeta, meta_digest
from prismatic.data.gripper import detect_gripper
from prismatic.errors import ConfigError
from prismatic.filenames import CACHE_FRAMES, CACHE_META, CACHE_STEPS
from prismatic.image import decode_jpeg, encode_jpeg

VIEWS = ("image", "wrist_image")  # their order in frames.bin; the second may be missing
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
JPEG_TAIL = 64  # bytes in which a whole one ends: some cameras pad


class CacheWriter:
    """Write a cache into an empty folder: `add` each episode, `finish` once. Memory holds numbers only, no images.

    views: what the data set itself calls its one or two cameras. rotate: turn each image by 180°.
    """

    def __init__(
        self, folder: Path, *, name: str, source: str = "", views: Sequence[str] = VIEWS, rotate: bool = False
    ) -> None:
        self._folder, self._name, self._source = Path(folder), name, source
        self._views, self._rotate = views, rotate
        self._frames = (self._folder / CACHE_FRAMES).open("wb")
        self._columns: dict[str, list[np.ndarray]] = {"action": [], "episode": [], "timestep": [], "instruction": []}
        self._sizes: list[int] = []
        self._crc: list[int] = []
        self._instructions: dict[str, int] = {}
        self._file_paths: list[str] = []
        self._content = hashlib.blake2b(digest_size=16)

    def add(
        self,
        images: Iterable[Sequence[bytes | np.ndarray]],
        *,
        action: np.ndarray,
        instructions: Sequence[str],
        state: np.ndarray | None = None,
        file_path: str = "",
    ) -> None:
        """An episode of T steps: per step its views (see to_jpeg), actions (T, D) as recorded, instructions T, states (T, K) or None.

        images may be an iterator: each step is written as it comes. ConfigError for NaN, infinity and an image that can't be read; ValueError where
        the lengths don't agree.
        """
        number, steps, before = len(self._file_paths), len(action), len(self._sizes)
        where = f"episode {number + 1} of {self._source or self._name}"
        given = {"action": action} | ({} if state is None else {"state": state})
        with np.errstate(over="ignore"):  # becomes infinity
            columns = {field: np.asarray(values).astype(np.float32) for field, values in given.items()}
        for field, values in columns.items():
            if values.ndim != 2 or values.shape[1] == 0 or not np.isfinite(values).all():
                said = f"{field} of {where} holds NaN or infinity, or no vectors"
                raise ConfigError(f"{said}: repair or drop that episode")
            self._columns.setdefault(field, []).append(values)
        for step in images:
            for view, image in zip(self._views, step, strict=True):
                jpeg = to_jpeg(image, rotate=self._rotate, where=f"{view} of {where}")
                self._frames.write(jpeg)
                self._content.update(jpeg)
                self._sizes.append(len(jpeg))
                self._crc.append(zlib.crc32(jpeg))
        written = (len(self._sizes) - before) // len(self._views)
        if not written == len(instructions) == steps:
            raise ValueError(f"{where}: {written} images and {len(instructions)} instructions for {steps} steps")
        self._content.update(self._columns["action"][-1].tobytes())
        self._content.update("\0".join(instructions).encode())
        self._columns["episode"].append(np.full(steps, number, dtype=np.int32))
        self._columns["timestep"].append(np.arange(steps, dtype=np.int32))
        numbers = [self._instructions.setdefault(text, len(self._instructions)) for text in instructions]
        self._columns["instruction"].append(np.array(numbers, dtype=np.int32))
        self._file_paths.append(file_path)

    def finish(self, **facts: Any) -> None:
        """Write the numbers and the description. facts: fields of CacheMeta that only the data set's format knows."""
        if not self._sizes:
            raise ConfigError(f"{self._source or self._name} has no episode with a step: give a data set that has some")
        self._frames.close()
        arrays = {key: np.concatenate(parts) for key, parts in self._columns.items()}
        meta = CacheMeta(
            format=CACHE_FORMAT,
            name=self._name,
            source=self._source,
            fingerprint=self._content.hexdigest(),
            images=list(VIEWS[: len(self._views)]),
            instructions=list(self._instructions),
            file_paths=self._file_paths,
            gripper=detect_gripper(arrays["action"], facts.get("action_names", ())),
            **facts,
        )
        text = json.dumps(dataclasses.asdict(meta), indent=1)
        (self._folder / CACHE_META).write_text(text)
        offsets = np.cumsum([0, *self._sizes])
        checks = {"crc": np.array(self._crc, dtype=np.uint32), "meta_digest": meta_digest(text.encode())}
        np.savez(self._folder / CACHE_STEPS, allow_pickle=False, offsets=offsets, **checks, **arrays)


def to_jpeg(image: bytes | np.ndarray, *, rotate: bool, where: str) -> bytes:
    """A file's bytes or (H, W, 3) uint8 pixels → JPEG of quality 95 and the same size; a JPEG stays as it is, unless it is turned by 180°.

    where: for the ConfigError of an image that can't be read, such as "observation/image of episode 3".
    """
    if isinstance(image, bytes) and image.startswith(JPEG_START) and not rotate:
        if JPEG_END not in image[-JPEG_TAIL:]:
            pixels_of(image, where)  # which says what is wrong with it
        return image
    pixels = pixels_of(image, where)
    return encode_jpeg(np.ascontiguousarray(pixels[::-1, ::-1]) if rotate else pixels)


def pixels_of(image: bytes | np.ndarray, where: str) -> np.ndarray:
    """(H, W, 3) uint8 of pixels or of a file's bytes."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            said = f"{where} is {image.dtype} of shape {image.shape}"
            raise ConfigError(f"{said}: give uint8 of shape (height, width, 3)")
        return image
    if not isinstance(image, bytes):
        raise ConfigError(f"{where} is of type {type(image).__name__}: give a JPEG's or PNG's bytes, or uint8 pixels")
    try:
        if image.startswith(JPEG_START):
            return decode_jpeg(image)
        if (picture := Image.open(io.BytesIO(image))).mode.startswith(("F", "I")):
            raise ValueError("more than 8 bits a pixel, of which converting would make black or white")
        return np.asarray(picture.convert("RGB"))
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        raise ConfigError(f"{where} is no image that can be read (JPEG, PNG): repair or drop that episode") from None
