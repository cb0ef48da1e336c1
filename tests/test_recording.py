"""recording.py: mp4, poster and GIF of one episode, read back."""

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

from prismatic.episodes import recording
from prismatic.episodes.recording import HOLD, Recording
from prismatic.errors import ConfigError

FRAMES = 12


def frame(index: int) -> np.ndarray:
    return np.full((64, 96, 3), 15 * index, np.uint8)


def film(path: Path, **options: object) -> Path:
    with Recording(path, **options) as recorded:  # type: ignore[arg-type]
        for step in range(FRAMES):
            recorded.add(frame(step), f"step {step}")
        recorded.end(frame(FRAMES), f"success after {FRAMES} steps")
    return path


def test_without_flags_a_plain_video_and_a_poster(tmp_path: Path) -> None:
    path = film(tmp_path / "7.mp4")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["7.jpg", "7.mp4"]
    frames = imageio.imread(path)
    assert frames.shape == (FRAMES + 1, 64, 96, 3)
    poster = np.asarray(Image.open(tmp_path / "7.jpg"))
    assert np.abs(poster.astype(int) - frame(FRAMES)).max() <= 3  # the last frame


def test_annotated_the_outcome_stays_to_be_read(tmp_path: Path) -> None:
    frames = imageio.imread(film(tmp_path / "7.mp4", caption="open the drawer")).astype(int)
    assert len(frames) == FRAMES + HOLD
    assert frames.shape[1] > 64 and frames.shape[1] % 2 == 0
    assert np.abs(frames[3, :60] - 45).max() <= 8  # the picture itself is whole
    strips = frames[:, 68:]
    assert strips.max() > 150  # there is ink
    green, red = strips[-1, ..., 1].astype(int), strips[-1, ..., 0].astype(int)
    assert (green - red).max() > 40 > (strips[0, ..., 1] - strips[0, ..., 0]).max()  # "success" only at the end


def test_a_gif_with_every_second_frame_that_repeats(tmp_path: Path) -> None:
    film(tmp_path / "7.mp4", gif=True)
    gif = Image.open(tmp_path / "7.gif")
    assert (gif.format, gif.size, gif.info["loop"]) == ("GIF", (96, 64), 0)
    assert abs(gif.n_frames - (FRAMES + 1) / 2) <= 1  # type: ignore[attr-defined]
    shades = []
    for index in range(gif.n_frames):  # type: ignore[attr-defined]
        gif.seek(index)
        shades.append(int(np.asarray(gif.convert("RGB")).mean()))
    assert shades == sorted(shades) and shades[-1] - shades[0] > 100


def test_an_exception_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Recording(tmp_path / "7.mp4", gif=True) as recorded:
        recorded.add(frame(0))
        recorded.end(frame(1), "failure")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_gif_that_cannot_be_made_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "GIF_FRAMES_PER_SECOND", -1)
    with pytest.raises(ConfigError, match=r"cannot write the video .*7\.gif \(.*\): make room"):
        film(tmp_path / "7.mp4", gif=True)
