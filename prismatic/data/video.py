"""Frames of mp4 files by time: decoded once where the times rise, and never the neighbour of the one that is meant."""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError

from prismatic.data.dataset_folder import AGAIN, check_no_pointer
from prismatic.errors import ConfigError

HALF_A_FRAME = 0.499  # how far, in frames, a frame's time may lie from the one that is asked for


class VideoFrames:
    """`at(path, seconds)`: a frame. Keeps one file open and goes on from where it is; seeks only to go back. A context manager."""

    def __init__(self, fps: float) -> None:
        self._reach = HALF_A_FRAME / fps
        self._path: Path | None = None
        self._container: InputContainer | None = None
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._held: av.VideoFrame | None = None
        self._first = 0.0

    def __enter__(self) -> "VideoFrames":
        return self

    def __exit__(self, *_: object) -> None:
        if self._container:
            self._container.close()

    def at(self, path: Path, seconds: float) -> np.ndarray:
        """(H, W, 3) uint8: the frame within half a frame of that time after the file's first frame.

        Work with presentation times: a foreign file's first may not be 0, and decoding times may be negative. ConfigError where the
        file is missing or damaged, and where it has no frame at that time.
        """
        try:
            if path != self._path:
                self._open(path)
            if self._held is not None and self._time(self._held) > seconds + self._reach:
                self._back_to(seconds)
            while self._held is None or self._time(self._held) < seconds - self._reach:
                self._held = next(self._frames, None)
                if self._held is None:
                    raise ConfigError(f"{path} ends before second {seconds:.3f}, where a frame should be: {AGAIN}")
        except (FFmpegError, IndexError) as error:
            raise ConfigError(f"{path} can't be decoded ({error}): {AGAIN}") from None
        if self._time(self._held) > seconds + self._reach:
            raise ConfigError(
                f"{path} has no frame at second {seconds:.3f}, the next is at {self._time(self._held):.3f}: {AGAIN}"
            )
        return self._held.to_ndarray(format="rgb24")

    def _time(self, frame: av.VideoFrame) -> float:
        assert frame.pts is not None and frame.time_base is not None
        return float(frame.pts * frame.time_base) - self._first

    def _open(self, path: Path) -> None:
        check_no_pointer(path)
        if self._container:
            self._container.close()
        self._path, self._held, self._first = path, None, 0.0
        self._container = container = av.open(str(path))
        self._frames = container.decode(video=0)
        self._held = next(self._frames, None)
        self._first = 0.0 if self._held is None else self._time(self._held)

    def _back_to(self, seconds: float) -> None:
        assert self._container is not None
        stream = self._container.streams.video[0]
        assert stream.time_base is not None
        target = max(0.0, seconds - self._reach) + self._first
        self._container.seek(int(target / stream.time_base), stream=stream)
        self._frames, self._held = self._container.decode(video=0), None
