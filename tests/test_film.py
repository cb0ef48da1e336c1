"""film.py: mp4 and poster of one episode, read back; what is drawn under the frames; what is left when nothing can be written."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

from prismatic.episodes.film import FRAMES_PER_SECOND, HOLD, MARGIN, PAPER, Film, draw_caption
from prismatic.errors import ConfigError

FRAMES = 12


def frame(index: int) -> np.ndarray:
    return np.full((64, 96, 3), 15 * index, np.uint8)


def film(path: Path, **options: object) -> Path:
    with Film(path, **options) as recorded:  # type: ignore[arg-type]
        for step in range(FRAMES):
            recorded.add(frame(step), f"step {step}")
        recorded.end(frame(FRAMES), f"success after {FRAMES} steps")
    return path


def test_without_flags_a_plain_video_and_a_poster(tmp_path: Path) -> None:
    path = film(tmp_path / "7.mp4")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["7.jpg", "7.mp4"]
    frames = imageio.imread(path)
    assert frames.shape == (FRAMES + 1, 64, 96, 3)
    assert np.abs(frames[:-1].astype(int) - np.stack([frame(step) for step in range(FRAMES)])).max() <= 8
    facts = imageio.immeta(path)
    assert (facts["codec"], facts["pix_fmt"].split("(")[0], facts["fps"]) == ("h264", "yuv420p", FRAMES_PER_SECOND)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before it is loaded
    poster = np.asarray(Image.open(tmp_path / "7.jpg"))
    assert np.abs(poster.astype(int) - frame(FRAMES)).max() <= 3  # the last frame


def test_annotated_the_outcome_stays_to_be_read(tmp_path: Path) -> None:
    frames = imageio.imread(film(tmp_path / "7.mp4", caption="open the drawer")).astype(int)
    assert len(frames) == FRAMES + HOLD
    green = frames[:, 68:, :, 1] - frames[:, 68:, :, 0]
    assert green[-1].max() > 40 > green[0].max()  # "success" only at the end


def test_an_exception_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Film(tmp_path / "7.mp4") as recorded:
        recorded.add(frame(0))
        recorded.end(frame(1), "failure")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_ffmpeg_left_unfinished_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio_ffmpeg

    def broken(path: str) -> None:
        Path(path).write_bytes(Path(path).read_bytes()[:500])
        whole(path)

    whole = imageio_ffmpeg.count_frames_and_secs
    monkeypatch.setattr(imageio_ffmpeg, "count_frames_and_secs", broken)
    with pytest.raises(ConfigError, match=r"a\.mp4 \(ffmpeg left it unfinished\): make room"):
        film(tmp_path / "a.mp4")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(ConfigError, match=r"a\.mp4 \(the disk is full\): make room, or use --save_videos False"):
        film(tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()
    with pytest.raises(ConfigError, match=r"cannot write the video .*gone"):
        film(tmp_path / "missing" / "a.mp4")


SENTENCE = "pick up the black bowl between the plate and the ramekin and place it on the plate"


def test_the_frame_stays_whole_and_the_sentence_fits_under_it() -> None:
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    drawn = draw_caption(image, SENTENCE, "step 3")
    assert drawn.shape[1:] == (256, 3) and drawn.shape[0] > 256 and drawn.shape[0] % 2 == 0
    assert (drawn[:256] == image).all()
    ink = (drawn[256:] != PAPER).any(axis=2)
    rows, columns = ink.any(axis=1), ink.any(axis=0)
    assert rows[MARGIN:-MARGIN].sum() > 20 and not rows[-2:].any()
    assert columns.sum() > 150 and not columns[-2:].any()  # wrapped before the edge
    for sentence in ("", "ö 蛋 \x00 ☂", "a" * 300):
        assert draw_caption(image, sentence, "step 0").shape[1:] == (256, 3)
