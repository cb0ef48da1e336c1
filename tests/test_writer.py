"""What is written once: caches, staged episodes and what is made of them. What would fail in training is refused, and nothing is left half-written.

That a changed byte of any of these files is noticed is test_hostile_inputs.py's.
"""

import io
import resource
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prismatic.arrays import read_arrays
from prismatic.data.frames import FrameCache
from prismatic.data.made_once import cached, made_of_staged
from prismatic.data.staging import load_episode, stage_episode
from prismatic.data.writer import CacheWriter
from prismatic.errors import ConfigError
from prismatic.filenames import STAGED_NOTE
from prismatic.image import encode_jpeg
from prismatic.normalize import Gripper
from tests.conftest import REPOSITORY
from tests.drawn_cache import write_cache
from tests.drawn_episodes import drawn_episode


def png16() -> bytes:
    """Grey levels of 16 bits, which would become white."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"action": np.full((3, 7), np.nan)}, "action of episode 1 .* NaN"),
        ({"state": np.full((3, 8), np.inf)}, "state of episode 1 .* infinity"),
        ({"action": np.full((3, 7), 1e39)}, "action of episode 1 .* infinity"),
        ({"action": np.zeros(3)}, "no vectors"),
        ({"images": [b"no image"] * 3}, "images of episode 1 of drawn is no image"),
        (
            {"images": [encode_jpeg(np.zeros((8, 8, 3), np.uint8))[:-40]] * 3},
            "images of episode 1 of drawn is no image",
        ),
        ({"images": [png16()] * 3}, "images of episode 1 of drawn is no image"),
        ({"images": ["a path"] * 3}, "is of type str"),
        ({"images": [np.zeros((4, 4, 3))] * 3}, r"float64 of shape \(4, 4, 3\): give uint8"),
    ],
)
def test_what_would_fail_in_training_is_refused(tmp_path: Path, change: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        write_cache(tmp_path / "drawn", [drawn_episode(1) | change])


def test_lengths_that_differ_and_no_step_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 images .* for 3 steps"):
        writer = CacheWriter(tmp_path, name="x", views=["image"])
        writer.add([[b"\xff\xd8\xff\xd9"]] * 2, action=np.zeros((3, 7)), instructions=["go"] * 3)
    with pytest.raises(ConfigError, match="no episode with a step"):
        CacheWriter(tmp_path, name="x").finish()


def test_another_convention_can_be_told(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "drawn", [drawn_episode(number) for number in (1, 0, 2)])
    raw = np.load(cache.folder / "steps.npz")["action"]
    told = FrameCache(cache.folder, Gripper((6,), "plus_one_open"))
    assert (told.actions[:, 6] == (raw[:, 6] > 0)).all() and (cache.actions[:, 6] == (raw[:, 6] < 0)).all()
    assert (told.actions[:, :6] == raw[:, :6]).all()
    untouched = FrameCache(cache.folder, Gripper((), "none"))
    assert (untouched.actions == raw).all() and untouched.statistics["action"]["mask"] == [True] * 7


# Staged episodes


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"wrist_images": [b"a", b"b"]}, "3 images and 2 wrist images"), ({"images": []}, "0 images")],
)
def test_staging_refuses_fields_that_disagree(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        stage_episode(tmp_path / "e.npz", **(drawn_episode(1) | change))


def test_an_episode_comes_back_as_it_was_and_a_full_disk_leaves_no_half_one(tmp_path: Path) -> None:
    episode, path = drawn_episode(2), tmp_path / "later" / "e.npz"
    stage_episode(path, **episode)
    loaded = load_episode(path)
    for field in ("state", "joint_state", "action"):
        assert (getattr(loaded, field) == episode[field]).all()
    for field in ("images", "wrist_images", "instruction", "file_path"):
        assert getattr(loaded, field) == episode[field]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # bytes a file may have: stands for a full disk
    try:
        with pytest.raises(ConfigError, match=r"cannot write .*later .*: make room"):
            stage_episode(path.with_name("f.npz"), **drawn_episode(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in path.parent.iterdir()] == ["e.npz"]


def test_arrays_that_claim_too_much_or_too_little_are_refused(tmp_path: Path) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({5 * 10**12},)}}".ljust(117) + "\n"
    claim = np.lib.format.MAGIC_PREFIX + b"\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive:
        archive.writestr("action.npy", claim + b"\0" * 300_000)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("action.npy", b"\0" * (65 << 20))
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    np.savez(tmp_path / "fewer.npz", a=np.zeros((9000, 7)))
    content = (tmp_path / "fewer.npz").read_bytes()
    (tmp_path / "fewer.npz").write_bytes(content.replace(b"(9000, 7)", b"(8000, 7)"))  # numpy would not notice
    for name in ("claim.npz", "objects.npz", "fewer.npz"):
        with pytest.raises(ValueError, match=r"claims|Object arrays|checksum"):
            read_arrays(tmp_path / name)
    tracemalloc.start()
    with pytest.raises(ValueError, match="far more"):
        read_arrays(tmp_path / "bomb.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


# Folders made once


def test_the_same_identity_is_filled_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def fill(folder: Path) -> None:
        made.append(folder)
        (folder / "meta.json").write_text("{}")

    (tmp_path / ".unfinished-killed").mkdir()
    first = cached(tmp_path, "a", ["x", 1], fill)
    second = cached(tmp_path, "a", ["x", 2], fill)
    assert first == cached(tmp_path, "a", ["x", 1], fill) != second and len(made) == 2
    assert {*tmp_path.iterdir()} == {first, second}


def test_a_second_process_waits_and_what_a_killed_one_left_goes(tmp_path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
from prismatic.data.made_once import cached

def fill(folder):
    (folder / "meta.json").write_text(sys.argv[1])
    print("filling", flush=True)
    time.sleep(float(sys.argv[2]))

cached(Path({str(tmp_path)!r}), "a", 0, fill)
"""

    def start(name: str, seconds: float, **how: Any) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", program, name, str(seconds)], cwd=REPOSITORY, text=True, **how)

    first = start("first", 600, stdout=subprocess.PIPE)
    assert first.stdout is not None and first.stdout.readline() == "filling\n"
    second = start("second", 0, stderr=subprocess.PIPE)
    assert second.stderr is not None and "waiting for another process" in second.stderr.readline()
    (left,) = tmp_path.iterdir()
    first.send_signal(signal.SIGKILL)
    assert (first.wait(), second.wait(timeout=60)) == (-signal.SIGKILL, 0)
    (cache,) = tmp_path.iterdir()
    assert left != cache and (cache / "meta.json").read_text() == "second"


def test_a_data_set_is_made_once_of_the_same_episodes_and_replaces_only_its_own(tmp_path: Path) -> None:
    stage, target, made = tmp_path / "stage", tmp_path / "out/set/1.0.0", []

    def fill(folder: Path, paths: Sequence[Path]) -> None:
        made.append([path.name for path in paths])
        (folder / "content").write_text(str(len(made)))

    def full(folder: Path, paths: Sequence[Path]) -> None:
        raise OSError("no space")

    with pytest.raises(ConfigError, match="no finished episode"):
        made_of_staged(stage, target, fill)
    stage.mkdir()
    (stage / "b.npz").touch()
    for _ in range(2):
        assert made_of_staged(stage, target, fill) == target
    (stage / "a.npz").touch()
    with pytest.raises(ConfigError, match="cannot write"):  # what was there before is kept
        made_of_staged(stage, target, full)
    assert (target / "content").read_text() == "1"
    made_of_staged(stage, target, fill)
    assert made == [["b.npz"], ["a.npz", "b.npz"]] and (target / "content").read_text() == "2"
    assert [*target.parent.iterdir()] == [target]
    (target / STAGED_NOTE).unlink()
    with pytest.raises(ConfigError, match="from elsewhere and is kept"):
        made_of_staged(stage, target, fill)
