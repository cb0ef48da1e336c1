"""What doctor.py finds in a data set, its page and its exit code; each fault is put into a cache that has none otherwise."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import doctor
from doctor import DoctorConfig
from prismatic.data.frames import FrameCache
from prismatic.data.look import look
from prismatic.data.mixture import sentences
from prismatic.data.writer import JPEG_END
from prismatic.errors import ConfigError
from prismatic.filenames import LEROBOT_INFO
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


def absolute(episodes: list[dict[str, Any]]) -> None:
    for one in episodes:
        one["state"][1:, :3] = one["action"][:-1, :3]


def action(place: Any, to: Callable[[np.ndarray], Any]) -> Callable[[list[dict[str, Any]]], None]:
    """Steps and dimensions of all actions, changed."""

    def put(episodes: list[dict[str, Any]]) -> None:
        for one in episodes:
            one["action"][place] = to(one["action"][place])

    return put


def every(field: str, value: Any) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda episodes: [one.update({field: value}) for one in episodes]


def shorten(episodes: list[dict[str, Any]]) -> None:
    episodes[0] = {name: values if name == "instruction" else values[:1] for name, values in episodes[0].items()}


FAULTS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str, str]] = {
    "a dead dimension": (action(np.s_[:, 4], lambda a: 0.3), "hurts", "pitch never change"),
    "all dead": (action(np.s_[:, :6], lambda a: 0.3), "wrong", "no dimension"),
    "metres": (action(np.s_[:, :3], lambda a: a * 0.04), "hurts", "metres"),
    "radians": (action(np.s_[:, 3], lambda a: a * 3), "hurts", "roll leave -1"),
    "absolute": (absolute, "hurts", "look absolute"),
    "one sign": (action(np.s_[:, :3], lambda a: abs(a) + 0.2), "hurts", "look absolute"),
    "a weak proof": (action(np.s_[:, 6], lambda a: a * 0.5 + 0.45), "wrong", "neither 0 nor -1"),
    "no-ops": (action(np.s_[5:9, :6], lambda a: 0), "hurts", "of the steps do nothing"),
    "a duplicate": (lambda episodes: episodes.append(episodes[3]), "hurts", "1 episodes are another one again"),
    "no instruction": (every("instruction", ""), "wrong", "no training episode has an instruction"),
    "one silent": (lambda episodes: episodes[1].update(instruction=""), "hurts", "1 episodes begin without"),
    "a silent step": (lambda episodes: episodes[1].update(instruction=["go", *[""] * 8]), "hurts", "8 steps have no instruction"),
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
    assert x.q01 > x.low


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(tmp_path: Path, fault: str) -> None:
    put, severity, text = FAULTS[fault]
    episodes = [episode(number) for number in range(EPISODES)]
    put(episodes)
    findings = look(write_cache(tmp_path / "faulty", episodes)).findings
    assert any(found.severity == severity and text in found.text and found.remedy for found in findings), findings


def test_a_whole_episode_is_decoded(tmp_path: Path) -> None:
    one = episode(0)
    one["images"][5] = one["images"][5][:40]
    with pytest.raises(ConfigError, match="no image that can be read"):
        write_cache(tmp_path / "cut", [one])
    one["images"][5] += JPEG_END  # what is broken inside is found only when it is decoded
    with pytest.raises(ConfigError, match="no whole JPEG"):
        look(write_cache(tmp_path / "broken", [one]))
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


def test_doctor_exits_2_where_training_would_be_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder, *_) = sorted(path for path in EXCERPT.iterdir() if (path / "meta").is_dir())
    where = {"dataset_name": folder.name, "cache_dir": tmp_path / "cache", "page_dir": tmp_path / "page"}
    assert doctor.main(DoctorConfig(simulator=False, data_root_dir=str(EXCERPT), **where)) == 0
    assert (tmp_path / f"page/{folder.name}.html").is_file() and "gripper" in capsys.readouterr().out
    old = Path(shutil.copytree(folder, tmp_path / "root" / folder.name, copy_function=shutil.copyfile))
    info = json.loads((old / LEROBOT_INFO).read_text())
    (old / LEROBOT_INFO).write_text(json.dumps(info | {"codebase_version": "v1.0"}))
    assert doctor.main(DoctorConfig(simulator=False, data_root_dir=str(old.parent), **where)) == 2
    assert "BAD" in capsys.readouterr().out
