"""Frames in, an H.264 mp4 (yuv420p: every browser plays it) out, written as the frames come so that none is
kept in memory.

A frame may have instruction or outcome drawn on it by the caller; here it is only encoded. Sides must be
even.
"""

import contextlib
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from prismatic.errors import ConfigError

FRAMES_PER_SECOND = 20  # LIBERO's control rate: the video runs as fast as the robot did
FULL_DISK_BYTES = 1 << 20  # with less free than this, a failed write is put down to the disk


class Video:
    """Use: `with Video(path) as video: video.add(frame)`. An exception inside removes the unfinished file.

    ConfigError when the file cannot be written, for instance because the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer: Any = None

    def add(self, frame: np.ndarray) -> None:
        """frame: (H, W, 3) uint8."""
        import imageio.v2 as imageio

        try:
            if self._writer is None:
                self._writer = imageio.get_writer(
                    self.path,
                    format="FFMPEG",  # type: ignore[arg-type]
                    fps=FRAMES_PER_SECOND,
                    codec="libx264",
                    pixelformat="yuv420p",
                    macro_block_size=2,  # what yuv420p needs; a larger one would resize the frames
                    ffmpeg_log_level="fatal",  # a killed simulator leaves an unfinished file: no news
                    # one thread: the simulators fill the cores; faststart: plays before it is loaded
                    quality=7,  # of 10, about 0.1 MB for 50 frames: failures are looked at closely
                    output_params=["-preset", "veryfast", "-threads", "1", "-movflags", "+faststart"],
                )
            self._writer.append_data(frame)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def close(self) -> None:
        """Finish the file."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
            if not _is_whole(self.path):  # ffmpeg runs on its own, and imageio doesn't ask how it ended
                raise OSError("ffmpeg left it unfinished")
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise unwritable(self.path, error) from error

    def __enter__(self) -> "Video":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(ConfigError):  # what is already under way says more
            self.close()
        self.path.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> ConfigError:
    """The sentence for a video, poster or GIF that cannot be written."""
    folder = path.parent
    if not folder.is_dir():
        reason = f"{folder} is gone"
    elif shutil.disk_usage(folder).free < FULL_DISK_BYTES:
        reason = "the disk is full"
    else:
        reason = str(error).splitlines()[0]
    return ConfigError(f"cannot write the video {path} ({reason}): make room, or use --save_videos False")


def _is_whole(path: Path) -> bool:
    """Whether an mp4's boxes (length and kind, 8 bytes, then content) fill the file and its index is among them."""
    kinds, place, size = set(), 0, path.stat().st_size
    with path.open("rb") as stream:
        while place + 8 <= size:
            stream.seek(place)
            length, kind = int.from_bytes(stream.read(4), "big"), stream.read(4)
            if length < 8:
                return False
            kinds.add(kind)
            place += length
    return place == size and b"moov" in kinds
