"""One episode on film: an mp4 as it is played (H.264, yuv420p: every browser plays it), and when it has ended its poster (the last frame).

Frames are written as they come, none is kept in memory. Their sides must be even.
"""

import contextlib
import shutil
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from prismatic.errors import ConfigError

FRAMES_PER_SECOND = 20  # LIBERO's control rate: the video runs as fast as the robot did
POSTER_QUALITY = 80  # of JPEG's 100, about 10 KB
HOLD = FRAMES_PER_SECOND  # frames for which an outcome that is drawn stays, so that it can be read
FULL_DISK_BYTES = 1 << 20  # with less free than this, a failed write is put down to the disk
# pixels, of a caption; a letter's width is the average of LIBERO's sentences
TEXT_SIZE, LINE, MARGIN, LETTER = 12, 15, 5, 6
INK, SOFT, PAPER = (240, 240, 240), (170, 180, 190), (24, 28, 34)
COLOURS = {"success": (110, 210, 150), "failure": (250, 150, 120)}  # of a status that begins with the word


class Film:
    """Use: `with Film(path) as film:`, `film.add` at each step, `film.end` once. An exception inside removes all files.

    caption: the instruction to be drawn under the frames; None draws nothing. ConfigError when a file cannot be written.
    """

    def __init__(self, path: Path, *, caption: str | None = None) -> None:
        self.path, self._poster, self._caption = path, path.with_suffix(".jpg"), caption
        self._writer: Any = None

    def add(self, frame: np.ndarray, status: str = "", *, times: int = 1) -> np.ndarray:
        """frame: (H, W, 3) uint8. status: what stands under the instruction. Returns the frame as it was drawn."""
        import imageio.v2 as imageio

        drawn = frame if self._caption is None else draw_caption(frame, self._caption, status)
        with _written(self.path):
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
            for _ in range(times):
                self._writer.append_data(drawn)
        return drawn

    def end(self, frame: np.ndarray, status: str) -> None:
        """The last frame, and how it ended."""
        drawn = self.add(frame, status, times=1 if self._caption is None else HOLD)
        with _written(self._poster):
            Image.fromarray(drawn).save(self._poster, quality=POSTER_QUALITY)

    def _close(self) -> None:
        from imageio_ffmpeg import count_frames_and_secs

        if self._writer is not None:
            with _written(self.path):
                self._writer.close()
                try:  # ffmpeg runs on its own, and imageio doesn't ask how it ended
                    count_frames_and_secs(str(self.path))
                except RuntimeError:
                    raise OSError("ffmpeg left it unfinished") from None

    def __enter__(self) -> "Film":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self._close()
            return
        with contextlib.suppress(ConfigError):  # what is already under way says more
            self._close()
        for path in (self.path, self._poster):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _written(path: Path) -> Any:
    """What is being written to `path`: an OSError becomes one sentence."""
    try:
        yield
    except OSError as error:
        if not path.parent.is_dir():
            reason = f"{path.parent} is gone"
        elif shutil.disk_usage(path.parent).free < FULL_DISK_BYTES:
            reason = "the disk is full"
        else:
            reason = str(error).splitlines()[0]
        path.unlink(missing_ok=True)
        raise ConfigError(f"cannot write the video {path} ({reason}): make room, or use --save_videos False") from error


def draw_caption(frame: np.ndarray, instruction: str, status: str) -> np.ndarray:
    """(H, W, 3) uint8 with a strip under it: the instruction, and how far the episode is or how it ended. The strip's height is even."""
    width, font = frame.shape[1], ImageFont.load_default(TEXT_SIZE)
    lines = textwrap.wrap(instruction, (width - 2 * MARGIN) // LETTER) or [""]
    height = 2 * MARGIN + LINE * (len(lines) + 1)
    strip = Image.new("RGB", (width, height + height % 2), PAPER)
    pen = ImageDraw.Draw(strip)
    for row, line in enumerate([*lines, status]):
        colour = COLOURS.get(status.split(" ")[0], SOFT) if row == len(lines) else INK
        pen.text((MARGIN, MARGIN + LINE * row), line, fill=colour, font=font)
    return np.concatenate([frame, np.asarray(strip)])
