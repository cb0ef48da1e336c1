"""demonstration.py: whose action moves the robot, and whose is recorded. A simulator that only counts; no rendering."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismatic.data.staging import load_episode
from prismatic.episodes import demonstration
from prismatic.episodes.demonstration import POLICY_STEPS, Demonstration, demonstrate

EXPERT = np.array([0.5, 0, 0, 0, 0, 0, 1], np.float32)  # the gripper is open
POLICY = np.array([0, -0.5, 0, 0, 0, 0, 0], np.float32)
STEPS = 100


class Counter:
    """A simulator that is solved after STEPS steps."""

    suite, task_id, instruction = "libero_spatial", 0, "count to a hundred"

    def __init__(self) -> None:
        self.executed: list[np.ndarray] = []
        self.rendered = 0

    def reset(self, _: None, *, seed: int) -> None:
        self.seed = seed

    def step(self, action: np.ndarray) -> bool:
        self.executed.append(np.asarray(action))
        return len(self.executed) == STEPS

    def frame(self) -> np.ndarray:
        self.rendered += 1
        return np.zeros((8, 8, 3), np.uint8)

    wrist = frame

    def state(self) -> np.ndarray:
        return np.zeros(8, np.float32)

    def joint_angles(self) -> np.ndarray:
        return np.zeros(7, np.float32)


class Learnt:
    num_images, uses_state = 2, True

    def __call__(
        self, frame: np.ndarray, instruction: str, wrist: np.ndarray, state: np.ndarray, *, episode: Path
    ) -> np.ndarray:
        assert state.shape == (8,)
        return POLICY


class Still:
    def chunk(self, frame: None, instruction: str) -> np.ndarray:
        return EXPERT[None]


def record(path: Path, monkeypatch: pytest.MonkeyPatch, *, policy: str, attempt: int = 0) -> Counter:
    sim: Any = Counter()
    monkeypatch.setattr(demonstration, "Expert", lambda sim: Still())
    monkeypatch.setattr(demonstration, "learnt_policy", lambda folder: Learnt())
    job = Demonstration(
        suite="libero_spatial",
        task_id=0,
        quality="fast",
        path=path,
        attempt=attempt,
        seed=0,
        perturbation=0.0,
        policy=policy,
    )
    assert demonstrate(sim, job, lambda: None) == STEPS
    return sim


def test_the_policy_acts_first_and_the_experts_answers_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = set()
    for attempt in range(6):
        sim = record(tmp_path / "a.npz", monkeypatch, policy="somewhere", attempt=attempt)
        by_policy = [np.array_equal(action, POLICY) for action in sim.executed]
        first = by_policy.index(False)
        assert POLICY_STEPS[0] <= first < POLICY_STEPS[1] and not any(by_policy[first:])
        lengths.add(first)
        recorded = load_episode(tmp_path / "a.npz")
        np.testing.assert_array_equal(recorded.action, np.tile([*EXPERT[:6], -1], (STEPS, 1)))
        assert recorded.file_path.endswith("/policy")
        assert sim.rendered == 2 * STEPS  # nothing is rendered twice
    assert len(lengths) > 3


def test_without_a_policy_the_expert_acts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = record(tmp_path / "a.npz", monkeypatch, policy="")
    np.testing.assert_array_equal(alone.executed, np.tile(EXPERT, (STEPS, 1)))
    assert not load_episode(tmp_path / "a.npz").file_path.endswith("/policy")
    assert record(tmp_path / "b.npz", monkeypatch, policy="somewhere").seed != alone.seed  # other states
