"""One episode on film: an mp4 as it is played; when it has ended its poster (the last frame) and, if asked, a GIF beside it."""

import subprocess
from pathlib import Path
from types import TracebackType

import numpy as np

from prismatic.episodes.caption import Caption
from prismatic.episodes.video import FRAMES_PER_SECOND, Video, unwritable

GIF_FRAMES_PER_SECOND = 10  # half the video's: GIFs are large
POSTER_QUALITY = 80  # of JPEG's 100, about 10 KB
HOLD = FRAMES_PER_SECOND  # frames for which an outcome that is drawn stays, so that it can be read


class Recording:
    """Use: `with Recording(path) as film:`, `film.add` at each step, `film.end` once. An exception inside removes all files.

    caption: the instruction to be drawn under the frames; None draws nothing. ConfigError when a file cannot be written.
    """

    def __init__(self, path: Path, *, caption: str | None = None, gif: bool = False) -> None:
        self.path, self.poster, self.gif = path, path.with_suffix(".jpg"), path.with_suffix(".gif")
        self._video, self._wants_gif = Video(path), gif
        self._instruction, self._caption = caption, None
        self.gif.unlink(missing_ok=True)  # of an earlier episode, should it have been left

    def add(self, frame: np.ndarray, status: str = "") -> None:
        """frame: (H, W, 3) uint8. status: what stands under the instruction."""
        self._video.add(self._drawn(frame, status))

    def end(self, frame: np.ndarray, status: str) -> None:
        """The last frame, and how it ended."""
        from PIL import Image

        drawn = self._drawn(frame, status)
        for _ in range(1 if self._instruction is None else HOLD):
            self._video.add(drawn)
        try:
            Image.fromarray(drawn).save(self.poster, quality=POSTER_QUALITY)
        except OSError as error:
            raise unwritable(self.poster, error) from error

    def _drawn(self, frame: np.ndarray, status: str) -> np.ndarray:
        if self._instruction is None:
            return frame
        if self._caption is None:
            self._caption = Caption(self._instruction, frame.shape[1])
        return self._caption.draw(frame, status)

    def _make_gif(self) -> None:
        from imageio_ffmpeg import get_ffmpeg_exe

        # a palette of its own for every film: GIF's usual one bands the table
        palette = f"fps={GIF_FRAMES_PER_SECOND},split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"
        command = [get_ffmpeg_exe(), "-loglevel", "error", "-y", "-threads", "1", "-i", str(self.path)]
        done = subprocess.run([*command, "-filter_complex", palette, str(self.gif)], capture_output=True, text=True)
        if done.returncode:
            raise unwritable(self.gif, OSError(done.stderr.strip() or "ffmpeg failed"))

    def __enter__(self) -> "Recording":
        self._video.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._video.__exit__(kind, error, trace)
        if kind is None and self._wants_gif:
            self._make_gif()
        if kind is not None:
            for path in (self.poster, self.gif):
                path.unlink(missing_ok=True)
