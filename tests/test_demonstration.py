"""demonstration.py: whose action moves the robot, and whose is recorded. A simulator that only counts; no rendering."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prismatic import checkpoint
from prismatic.data.staging import load_episode
from prismatic.episodes import demonstration
from prismatic.episodes.demonstration import POLICY_STEPS, Demonstration, Pushes, is_no_op
from prismatic.errors import ConfigError
from prismatic.image import decode_jpeg
from tests.fake_simulator import ScriptedSimulator

EXPERT = np.array([0.5, 0, 0, 0, 0, 0, 1], np.float32)  # the gripper is open
POLICY = np.array([0, -0.5, 0, 0, 0, 0, 0], np.float32)
STEPS = 100


class Learnt:
    num_images, uses_state, num_actions_chunk = 2, True, 1

    def chunk(self, frame: Any, instruction: str, wrist: Any, state: np.ndarray, *, episode: Path) -> np.ndarray:
        assert wrist is not None and state.shape == (8,)
        return np.tile(POLICY, (self.num_actions_chunk, 1))


class Still:
    def __init__(self, sim: Any) -> None:
        pass

    def chunk(self, frame: None, instruction: str) -> np.ndarray:
        return EXPERT[None]


def record(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, policy: str, attempt: int = 0, steps: int | None = STEPS
) -> ScriptedSimulator:
    sim: Any = ScriptedSimulator(lambda count: count == STEPS)
    monkeypatch.setattr(demonstration, "Expert", Still)
    monkeypatch.setattr(demonstration, "learnt_policy", lambda folder: Learnt())
    job = Demonstration("libero_spatial", 0, "fast", path, attempt=attempt, seed=0, perturbation=0.0, policy=policy)
    length = job.record(sim, lambda: None)
    assert steps is None or length == steps
    return sim


def test_the_policy_acts_first_and_the_experts_answers_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = set()
    for attempt in range(6):
        sim = record(tmp_path / "a.npz", monkeypatch, policy="somewhere", attempt=attempt)
        by_policy = [np.array_equal(action, POLICY) for action in sim.commands]
        first = by_policy.index(False)
        assert POLICY_STEPS[0] <= first < POLICY_STEPS[1] and not any(by_policy[first:])
        lengths.add(first)
        recorded = load_episode(tmp_path / "a.npz")
        np.testing.assert_array_equal(recorded.action, np.tile([*EXPERT[:6], -1], (STEPS, 1)))
        assert recorded.file_path.endswith("/policy")
        assert sim.rendered == 2 * STEPS  # nothing is rendered twice
    assert len(lengths) > 3


def test_of_a_policy_of_chunks_only_the_experts_own_steps_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Learnt, "num_actions_chunk", 8)
    sim = record(tmp_path / "a.npz", monkeypatch, policy="somewhere", steps=None)
    by_expert = [not np.array_equal(action, POLICY) for action in sim.commands]
    assert len(load_episode(tmp_path / "a.npz").action) == sum(by_expert) < STEPS == len(by_expert)
    looks = -(-by_expert.index(True) // 8)  # of the policy, which executes its chunks whole
    assert sim.rendered == 2 * (looks + sum(by_expert))


@pytest.mark.parametrize("policy", ["", "somewhere"])
def test_each_image_is_of_its_own_step_and_a_failure_is_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    record(tmp_path / "a.npz", monkeypatch, policy=policy)
    greys = [decode_jpeg(image)[0, 0, 0] for image in load_episode(tmp_path / "a.npz").images]
    np.testing.assert_allclose(greys, [20 * step % 256 for step in range(STEPS)], atol=1)
    monkeypatch.setattr(sys.modules[__name__], "STEPS", 1000)  # beyond the limit
    failed = record(tmp_path / "b.npz", monkeypatch, policy=policy, steps=0)
    assert failed.rendered == 2 * sum(np.array_equal(action, POLICY) for action in failed.commands)


def test_a_policy_of_another_robot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = SimpleNamespace(processor=SimpleNamespace(action_dim=14))
    monkeypatch.setattr(checkpoint, "load_policy", lambda folder, device: arms)
    with pytest.raises(ConfigError, match="policy_checkpoint arms answers with 14 numbers and LIBERO takes 7"):
        demonstration.learnt_policy("arms")


def test_without_a_policy_the_expert_acts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = record(tmp_path / "a.npz", monkeypatch, policy="")
    np.testing.assert_array_equal(alone.commands, np.tile(EXPERT, (STEPS, 1)))
    assert not load_episode(tmp_path / "a.npz").file_path.endswith("/policy")
    other = record(tmp_path / "b.npz", monkeypatch, policy="somewhere")
    assert other.started_from != alone.started_from


def test_no_ops() -> None:
    still, closing, moving = np.zeros(7), np.array([0, 0, 0, 0, 0, 0, 1.0]), np.array([0.1, 0, 0, 0, 0, 0, 0])
    assert is_no_op(still, None) and is_no_op(closing, None)
    assert is_no_op(still, still) and not is_no_op(closing, still)
    assert not is_no_op(moving, None) and not is_no_op(moving, moving)


def test_pushes_come_in_bursts_and_repeat_with_the_seed() -> None:
    def drawn(size: float) -> np.ndarray:
        pushes = Pushes(np.random.default_rng(4), size)
        return np.stack([pushes() for _ in range(2000)])

    pushes = drawn(0.5)
    np.testing.assert_array_equal(pushes, drawn(0.5))
    pushed = np.abs(pushes).max(axis=1) > 0
    assert 0.2 < pushed.mean() < 0.6
    assert np.abs(pushes).max() <= 0.5
    same = np.ptp(np.stack([pushes[1:], pushes[:-1]]), axis=0).sum(axis=1) == 0
    assert np.mean(same & pushed[1:]) > 0.7 * np.mean(pushed[1:])
    assert not drawn(0.0).any()
