"""The one writer of caches: what goes in comes out, what would fail in training is refused, and a changed byte is noticed where it is read."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from prismatic.data.cache_files import CACHE_FORMAT, OLD_FORMAT
from prismatic.data.frames import FrameCache
from prismatic.data.made_once import cached, made_of_staged, unfinished
from prismatic.data.writer import CacheWriter
from prismatic.errors import ConfigError
from prismatic.filenames import STAGED_NOTE
from prismatic.normalize import Gripper
from tests.conftest import REPOSITORY
from tests.drawn_cache import write_cache
from tests.drawn_episodes import drawn_episode


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return write_cache(tmp_path / "drawn", [drawn_episode(number) for number in (1, 0, 2)])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"action": np.full((3, 7), np.nan)}, "action of episode 1 .* NaN"),
        ({"state": np.full((3, 8), np.inf)}, "state of episode 1 .* infinity"),
        ({"action": np.zeros(3)}, "no vectors"),
    ],
)
def test_numbers_that_would_fail_in_training_are_refused(tmp_path: Path, change: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        write_cache(tmp_path / "drawn", [drawn_episode(1) | change])


def test_lengths_that_differ_and_no_step_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 images .* for 3 steps"):
        writer = CacheWriter(tmp_path, name="x", has_wrist=False)
        writer.add([[b"a"], [b"b"]], action=np.zeros((3, 7)), instructions=["go"] * 3)
    with pytest.raises(ConfigError, match="no episode with a step"):
        CacheWriter(tmp_path, name="x").finish()


@pytest.mark.parametrize("file", ["frames.bin", "meta.json", "steps.npz"])
def test_a_changed_byte_is_noticed_where_it_is_read(cache: FrameCache, file: str) -> None:
    path = cache.folder / file
    content = bytearray(path.read_bytes())
    place = content.index(b"put block") if file == "meta.json" else len(content) // 2
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="delete it"):
        again = FrameCache(cache.folder)
        for frame in range(len(again)):
            again[frame]


def test_another_convention_can_be_told(cache: FrameCache) -> None:
    raw = np.load(cache.folder / "steps.npz")["action"][:, 6]
    told = FrameCache(cache.folder, Gripper((6,), "plus_one_open"))
    assert (told.actions[:, 6] == (raw > 0)).all() and (cache.actions[:, 6] == (raw < 0)).all()
    untouched = FrameCache(cache.folder, Gripper((), "none"))
    assert (untouched.actions[:, 6] == raw).all() and untouched.statistics["action"]["mask"] == [True] * 7


def test_the_same_identity_is_filled_once_and_an_older_format_s_cache_goes(tmp_path: Path) -> None:
    made: list[Path] = []
    for name, source in (("a-old", "here"), ("a-other", "elsewhere"), ("b-old", "here")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(json.dumps({"format": OLD_FORMAT, "source": source}))

    def fill(folder: Path) -> None:
        made.append(folder)
        (folder / "meta.json").write_text(json.dumps({"format": CACHE_FORMAT, "source": "here"}))

    first = cached(tmp_path, "a", ["x", 1], fill)
    second = cached(tmp_path, "a", ["x", 2], fill)
    assert first == cached(tmp_path, "a", ["x", 1], fill) != second and len(made) == 2
    assert {*tmp_path.iterdir()} == {first, second, tmp_path / "a-other", tmp_path / "b-old"}


def test_a_data_set_is_made_once_of_the_same_episodes_and_replaces_only_its_own(tmp_path: Path) -> None:
    stage, target, made = tmp_path / "stage", tmp_path / "out/set/1.0.0", []

    def fill(folder: Path, paths: Sequence[Path]) -> Path:
        made.append([path.name for path in paths])
        (folder / "inner").mkdir()
        (folder / "inner/content").write_text(str(len(made)))
        return folder / "inner"

    def full(folder: Path, paths: Sequence[Path]) -> Path:
        raise OSError("no space")

    with pytest.raises(ConfigError, match="no finished episode"):
        made_of_staged(stage, target, fill)
    stage.mkdir()
    (stage / "b.npz").touch()
    for _ in range(2):
        assert made_of_staged(stage, target, fill) == target
    (stage / "a.npz").touch()
    with pytest.raises(ConfigError, match="can't write to"):  # what was there before is kept
        made_of_staged(stage, target, full)
    assert (target / "content").read_text() == "1"
    made_of_staged(stage, target, fill)
    assert made == [["b.npz"], ["a.npz", "b.npz"]] and (target / "content").read_text() == "2"
    assert [*target.parent.iterdir()] == [target]
    (target / STAGED_NOTE).unlink()
    with pytest.raises(ConfigError, match="from elsewhere and is kept"):
        made_of_staged(stage, target, fill)


def test_what_a_killed_writer_left_goes_with_the_next_call(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from prismatic.data.made_once import unfinished
with unfinished(Path("{tmp_path}")) as folder:
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == -9
    (left,) = tmp_path.iterdir()
    with unfinished(tmp_path) as folder:  # a writer at work is left alone
        assert not left.exists()
        with unfinished(tmp_path):
            assert folder.exists()
    assert list(tmp_path.iterdir()) == []
