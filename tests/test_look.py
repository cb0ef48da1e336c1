"""What doctor.py finds in a data set, its page and its exit code; each fault is put into a cache that has none otherwise."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismatic.data.frames import FrameCache
from prismatic.data.look import look
from prismatic.data.mixture import sentences
from prismatic.errors import ConfigError
from prismatic.image import encode_jpeg
from prismatic.pages.dataset import write_page
from tests.conftest import REPOSITORY
from tests.drawn_cache import write_cache

EXCERPT = REPOSITORY / "tests" / "reference_lerobot"
EPISODES, STEPS = 12, 9


def episode(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    action = rng.uniform(-1, 1, size=(STEPS, 7)).astype(np.float32)
    action[:, 6] = np.where(np.arange(STEPS) < 4, -1, 1)
    images = [encode_jpeg(rng.integers(0, 255, (48, 64, 3)).astype(np.uint8)) for _ in range(2 * STEPS)]
    return {
        "images": images[:STEPS],
        "wrist_images": images[STEPS:],
        "action": action,
        "state": rng.normal(size=(STEPS, 8)).astype(np.float32),
        "instruction": f"lift block {number % 3}",
    }


def change(field: str, to: Callable[[np.ndarray], None]) -> Callable[[list[dict[str, Any]]], None]:
    def put(episodes: list[dict[str, Any]]) -> None:
        for one in episodes:
            to(one[field])

    return put


def absolute(episodes: list[dict[str, Any]]) -> None:
    for one in episodes:
        one["state"][1:, :3] = one["action"][:-1, :3]


def every(field: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    def put(episodes: list[dict[str, Any]]) -> None:
        for one in episodes:
            one[field] = value

    return put


def shorten(episodes: list[dict[str, Any]]) -> None:
    first = episodes[0]
    episodes[0] = {name: values if name == "instruction" else values[:1] for name, values in first.items()}


FAULTS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str, str]] = {
    "a dead dimension": (change("action", lambda a: a.__setitem__((slice(None), 4), 0.3)), "hurts", "pitch never change"),
    "all dead": (change("action", lambda a: a.__setitem__((slice(None), slice(0, 6)), 0.3)), "wrong", "no dimension"),
    "metres": (change("action", lambda a: a.__setitem__((slice(None), slice(0, 3)), a[:, :3] * 0.04)), "hurts", "metres"),
    "radians": (change("action", lambda a: a.__setitem__((slice(None), 3), a[:, 3] * 3)), "hurts", "roll leave -1"),
    "absolute": (absolute, "hurts", "look absolute"),
    "one sign": (change("action", lambda a: a.__setitem__((slice(None), slice(0, 3)), abs(a[:, :3]) + 0.2)), "hurts", "look absolute"),
    "a weak proof": (change("action", lambda a: a.__setitem__((slice(None), 6), a[:, 6] * 0.5 + 0.45)), "wrong", "may be noise"),
    "no-ops": (change("action", lambda a: a.__setitem__((slice(5, 9), slice(0, 6)), 0)), "hurts", "of the steps do nothing"),
    "a duplicate": (lambda episodes: episodes.append(episodes[3]), "hurts", "1 episodes are another one again"),
    "no instruction": (every("instruction", ""), "wrong", "no training episode has an instruction"),
    "one silent": (lambda episodes: episodes[1].update(instruction=""), "hurts", "1 episodes begin without"),
    "blanks and capitals": (lambda episodes: episodes[0].update(instruction="Lift  block 0"), "hurts", "blanks or capitals"),
    "one step": (shorten, "hurts", "1 episodes have one step"),
    "one colour": (every("images", [encode_jpeg(np.zeros((48, 64, 3), np.uint8))] * STEPS), "wrong", "show one colour"),
    "few": (lambda episodes: episodes.__delitem__(slice(3, None)), "hurts", "only 3 episodes"),
}  # fmt: skip


@pytest.fixture
def healthy(tmp_path: Path) -> FrameCache:
    return write_cache(tmp_path / "healthy", [episode(number) for number in range(EPISODES)])


def test_nothing_is_found_where_nothing_is_wrong(healthy: FrameCache) -> None:
    found = look(healthy)
    assert found.findings == [] and found.lengths.tolist() == [STEPS] * EPISODES
    assert dict(found.instructions) == {f"lift block {n}": 4 for n in range(3)}
    x, gripper = found.dimensions[0], found.dimensions[6]
    assert (x.name, gripper.gripper, sum(x.counts)) == ("x", True, EPISODES * STEPS)
    assert 0 < x.clipped < 0.05 and x.q01 > x.low and gripper.clipped == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(tmp_path: Path, fault: str) -> None:
    put, severity, text = FAULTS[fault]
    episodes = [episode(number) for number in range(EPISODES)]
    put(episodes)
    findings = look(write_cache(tmp_path / "faulty", episodes)).findings
    assert any(finding.severity == severity and text in finding.text and finding.remedy for finding in findings), (
        findings
    )


def test_a_whole_episode_is_decoded(tmp_path: Path) -> None:
    one = episode(0)
    one["images"][5] = one["images"][5][:40]
    with pytest.raises(ConfigError, match="no whole JPEG"):
        look(write_cache(tmp_path / "cut", [one]))
    one["images"][5] = encode_jpeg(np.zeros((10, 10, 3), np.uint8))
    with pytest.raises(ConfigError, match="several sizes"):
        look(write_cache(tmp_path / "sizes", [one]))


def test_the_page_is_whole_offline_and_escaped(healthy: FrameCache, tmp_path: Path) -> None:
    strange = write_cache(tmp_path / "strange", [episode(0) | {"instruction": "<script>alert(1)</script>"}])
    page, sheet = write_page(strange, look(strange), sentences(strange), tmp_path / "pages")
    text = page.read_text()
    assert "&lt;script&gt;alert(1)" in text and "<script>alert" not in text
    assert not any(word in text for word in ("http://", "https://", 'src="/', "url("))
    assert text.count("data:image/jpeg;base64,") == 4  # first and last of two cameras
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert all(sentence.split(";")[0] in text for sentence in sentences(strange)[:1])


def run_doctor(tmp_path: Path, root: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "doctor.py",
        "--simulator",
        "False",
        "--data_root_dir",
        str(root),
        "--dataset_name",
        name,
    ]
    environment = os.environ | {"WORKSPACE": str(tmp_path / "workspace")}
    return subprocess.run([*command, *options], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_doctor_exits_2_where_training_would_be_wrong(tmp_path: Path) -> None:
    (folder, *_) = sorted(path for path in EXCERPT.iterdir() if (path / "meta").is_dir())
    good = run_doctor(tmp_path, EXCERPT, folder.name)
    assert good.returncode == 0, good.stdout + good.stderr
    assert (tmp_path / f"workspace/doctor/{folder.name}.html").is_file() and "gripper" in good.stdout
    silent = tmp_path / "root" / folder.name
    silent.mkdir(parents=True)
    for part in ("data", "videos", "meta"):
        if (folder / part).is_dir():
            (silent / part).symlink_to(folder / part)
    (silent / "meta").unlink()
    (silent / "meta").mkdir()
    for path in (folder / "meta").iterdir():
        (silent / "meta" / path.name).symlink_to(path)
    info = json.loads((folder / "meta/info.json").read_text())
    (silent / "meta/info.json").unlink()
    (silent / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v1.0"}))
    wrong = run_doctor(tmp_path, silent.parent, folder.name)
    assert wrong.returncode == 2 and "BAD" in wrong.stdout and "Traceback" not in wrong.stderr
