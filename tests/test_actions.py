"""Actions of an episode come back to the bit; the report's lines say what the numbers did."""

import re
from pathlib import Path

import numpy as np
import pytest

from prismatic.episodes.result import load_actions, save_actions
from prismatic.errors import ConfigError
from prismatic.pages.gallery import MOST_POINTS, line


def test_actions_come_back_to_the_bit(tmp_path: Path) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (220, 7)).astype(np.float32)
    name = save_actions(tmp_path, "libero_goal/task3/state9/seed0", actions)
    assert name == "actions/libero_goal-task3-state9-seed0.npz"
    loaded = load_actions(tmp_path, name)
    assert loaded is not None and loaded.tobytes() == actions.tobytes()
    assert (tmp_path / name).stat().st_size < 8_000  # 500 episodes: 4 MB
    assert save_actions(tmp_path, "libero_goal/task3/state9/seed0", actions[:5]) == name  # played again
    assert np.load(tmp_path / name, allow_pickle=False)["actions"].shape == (5, 7)
    (tmp_path / "actions" / "a.npz").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*a\.npz"):
        save_actions(tmp_path, "a", np.zeros((3, 7)))


def test_a_missing_or_damaged_file_is_no_reason_to_fail(tmp_path: Path) -> None:
    assert load_actions(tmp_path, None) is None
    assert load_actions(tmp_path, "actions/gone.npz") is None
    for content in (b"", b"PK\x03\x04 torn", b"\x93NUMPY torn"):
        (tmp_path / "a.npz").write_bytes(content)
        assert load_actions(tmp_path, "a.npz") is None
    np.save(tmp_path / "a.npy", np.zeros((4, 7)))
    assert load_actions(tmp_path, "a.npy") is None  # an array, no archive
    for actions in (np.zeros((4, 6)), np.full((4, 7), "up"), np.zeros((4, 7), dtype=complex)):
        np.savez(tmp_path / "a.npz", actions=actions)
        assert load_actions(tmp_path, "a.npz") is None


def points(path: str) -> np.ndarray:
    numbers = [[int(number) for number in pair.split()] for pair in re.split("[Ml]", path)[1:]]
    return np.cumsum(numbers, axis=0)


def test_a_line_goes_from_left_to_right_and_up_for_more() -> None:
    up = points(line(np.array([-0.5, 0.0, 0.5]), width=200, height=100, limit=0.5))
    assert up.tolist() == [[0, 100], [100, 50], [200, 0]]
    clipped = points(line(np.array([9.0, np.nan, -9.0]), width=200, height=100, limit=0.5))
    assert clipped[:, 1].tolist() == [0, 50, 100]
    assert points(line(np.array([1.0]), width=200, height=100, limit=1.0)).tolist() == [[0, 0]]
    long = points(line(np.linspace(-1, 1, 520), width=2000, height=180, limit=1.0))
    assert len(long) == MOST_POINTS
    assert long[0].tolist() == [0, 180] and long[-1].tolist() == [2000, 0]
