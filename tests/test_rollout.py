"""rollout.py: a policy that answers chunks acts as OpenVLA-OFT's own loop does, and nothing is rendered that nobody looks at."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismatic.errors import ConfigError, PolicyError
from prismatic.rollout import Episode, rollout
from prismatic.simulator import SETTLE_ACTION, LiberoSimulator, Task, axis_angle
from tests.fake_simulator import FakeSimulator


class Environment:
    """Stands for LIBERO's: it keeps the commands that reach it, and says `done` after one of them."""

    def __init__(self, done_at: int | None) -> None:
        self.commands: list[np.ndarray] = []
        self.done_at, self.env, self.object_property_initializers = done_at, self, []
        self.seed = self.reset = self.set_init_state = lambda *given: None

    def step(self, command: np.ndarray) -> tuple[None, float, bool]:
        self.commands.append(command)
        return None, 0.0, len(self.commands) == self.done_at


class Recorded(LiberoSimulator):
    """LIBERO's conventions without LIBERO. looks: how many commands there had been when a frame was asked for."""

    def __init__(self, done_at: int | None) -> None:
        self.recording, self.looks = Environment(done_at), []
        super().__init__(Task("s", 0, "go", Path("none"), np.zeros((1, 3))))

    def _make_env(self) -> Environment:
        return self.recording

    def frame(self) -> np.ndarray:
        self.looks.append(len(self.recording.commands))
        return np.zeros((8, 8, 3), np.uint8)

    def state(self) -> np.ndarray:
        return np.zeros(8, np.float32)


class Chunks:
    """Answers the given chunks, one after the other, then the last for ever."""

    num_images, uses_state = 1, True

    def __init__(self, chunks: np.ndarray) -> None:
        self.chunks, self.queries = chunks, 0

    def chunk(self, frame: Any, instruction: str, wrist: Any = None, state: Any = None) -> np.ndarray:
        assert frame is not None and wrist is None and state.shape == (8,)
        self.queries += 1
        return self.chunks[min(self.queries, len(self.chunks)) - 1]


def played(chunks: np.ndarray, case: dict[str, Any], limit: int) -> tuple[Recorded, Chunks, Episode]:
    sim, actor = Recorded(case["done_at_env_step"]), Chunks(chunks)
    count = case["num_open_loop_steps"]
    return sim, actor, rollout(sim, actor, init_state=0, max_steps=limit, num_open_loop_steps=count)


@pytest.fixture(scope="module")
def loop(oft_numbers: Path) -> tuple[dict[str, Any], Any]:
    facts = json.loads((oft_numbers / "eval_loop.json").read_text())
    return facts, np.load(oft_numbers / "eval_loop.npz", allow_pickle=False)


def test_the_loop_is_the_originals(loop: tuple[dict[str, Any], Any]) -> None:
    """But where fewer actions than the chunk's are executed: the original's queue keeps the last of them (docs/differences.md)."""
    facts, arrays = loop
    fewer = []
    for number, case in enumerate(facts["episodes"]):
        chunks, steps = arrays[f"chunks_{number}"], case["num_open_loop_steps"]
        sim, actor, episode = played(chunks, case, facts["task_max_steps"][case["suite"]])
        assert (len(sim.recording.commands), actor.queries) == (case["env_steps"], case["queries"])
        fewer.append(steps < chunks.shape[1])
        if fewer[-1]:
            np.testing.assert_array_equal(episode.actions[: 2 * steps], [*chunks[0][:steps], *chunks[1][:steps]])
            continue
        assert episode.success == case["success"]
        assert sim.looks[: len(case["query_at_env_step"])] == case["query_at_env_step"]
        expected = arrays[f"env_actions_{number}"]
        np.testing.assert_array_equal(np.array(sim.recording.commands[: len(expected)], dtype=float), expected)
    assert not all(fewer)


def test_axis_angles_are_the_originals_and_their_sign_is_not_flipped(loop: tuple[dict[str, Any], Any]) -> None:
    _, arrays = loop
    ours = np.array([axis_angle(quaternion) for quaternion in arrays["quaternions_xyzw"]])
    np.testing.assert_allclose(ours, arrays["axis_angles"], atol=1e-12)
    assert (arrays["quaternions_xyzw"][:, 3] < 0).any()


def test_gripper_rule(loop: tuple[dict[str, Any], Any]) -> None:
    _, arrays = loop
    for value, command in zip(arrays["gripper_in"], arrays["gripper_env"], strict=True):
        sim = Recorded(None)
        rollout(sim, Chunks(np.array([[[0, 0, 0, 0, 0, 0, value]]])), init_state=0, max_steps=1)
        assert sim.recording.commands[-1][6] == command
        np.testing.assert_array_equal(sim.recording.commands[0], SETTLE_ACTION)


def test_the_queue_is_empty_at_an_episodes_start_and_a_frame_is_rendered_when_somebody_looks() -> None:
    sim, actor = FakeSimulator("fake", 0), Chunks(np.zeros((9, 8, 7)))
    for episode in range(2):
        rollout(sim, actor, init_state=0, max_steps=10)  # ends within a chunk
        assert actor.queries == 2 * (episode + 1) and sim.rendered == 2
    seen: list[bool] = []
    rollout(sim, actor, init_state=0, max_steps=10, on_step=lambda step, frame: seen.append(frame is not None))
    assert seen == [True, *[False] * 7, True, False]


def test_an_answer_that_is_no_action_is_the_policys_error() -> None:
    for chunk in (np.full((1, 1, 7), np.nan), np.zeros((1, 1, 6))):
        episode = rollout(Recorded(None), Chunks(chunk), init_state=0, max_steps=5)
        assert (episode.error or "").startswith(PolicyError.__name__) and not episode.success
    with pytest.raises(ConfigError, match="num_trials_per_task"):
        rollout(Recorded(None), Chunks(np.zeros((1, 1, 7))), init_state=1, max_steps=5)
