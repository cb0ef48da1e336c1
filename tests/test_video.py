"""video.py: what a browser plays, and what is left when it cannot be written."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest

from prismatic.episodes import video
from prismatic.episodes.video import Video
from prismatic.errors import ConfigError


def frames(count: int = 7) -> np.ndarray:
    """(count, 34, 50, 3): sides that are even, but no multiples of 16."""
    return np.stack([np.full((34, 50, 3), 30 * index, np.uint8) for index in range(count)])


def write(path: Path) -> Path:
    with Video(path) as written:
        for frame in frames():
            written.add(frame)
    return path


def test_every_frame_arrives_as_h264_yuv420p(tmp_path: Path) -> None:
    read = imageio.imread(write(tmp_path / "a.mp4"))
    assert read.shape == (7, 34, 50, 3)
    assert np.abs(read.astype(int) - frames()).max() <= 6
    facts = imageio.immeta(tmp_path / "a.mp4")
    assert (facts["codec"], facts["pix_fmt"].split("(")[0]) == ("h264", "yuv420p")
    assert facts["fps"] == video.FRAMES_PER_SECOND
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before it is loaded


def test_an_exception_removes_the_unfinished_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), Video(tmp_path / "a.mp4") as written:
        written.add(frames()[0])
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_short_by_ffmpeg_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "whole.mp4").read_bytes()
    assert video._is_whole(tmp_path / "whole.mp4")
    for length in (0, 20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.mp4").write_bytes(whole[:length])
        assert not video._is_whole(tmp_path / "cut.mp4")
    monkeypatch.setattr(video, "_is_whole", lambda path: False)
    with pytest.raises(ConfigError, match=r"a\.mp4 \(ffmpeg left it unfinished\): make room"):
        write(tmp_path / "a.mp4")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(ConfigError, match=r"a\.mp4 \(the disk is full\): make room, or use --save_videos False"):
        write(tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()
