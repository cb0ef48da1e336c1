"""controls.py: what a policy is told, and what an env seed moved."""

from typing import Any, cast

import numpy as np
import pytest

from prismatic.episodes.controls import instruction_given, moved_by_seed
from prismatic.errors import ConfigError
from prismatic.scene import suites
from tests.fake_simulator import FakeSimulator

LIBERO = suites.Libero()


def test_instructions_of_a_policy_that_may_not_read() -> None:
    given = [instruction_given(LIBERO, "libero_goal", 7, kind) for kind in ("empty", "swap", "paraphrase")]
    assert given == ["", suites.instruction("libero_goal", 8), "switch on the stove"]  # the last is LIBERO-PRO's
    assert instruction_given(LIBERO, "libero_goal", 9, "swap") == suites.instruction("libero_goal", 0)
    with pytest.raises(ConfigError, match="nobody has paraphrased libero_90"):
        instruction_given(LIBERO, "libero_90", 0, "paraphrase")


def test_every_tasks_other_sentence_differs() -> None:
    for suite in suites.STEP_LIMITS:
        for task in range(suites.num_tasks(suite)):
            own = suites.instruction(suite, task)
            for kind in ("swap", "paraphrase")[: 1 if suite == "libero_90" else 2]:
                assert instruction_given(LIBERO, suite, task, kind) != own

    class OneSentence:
        num_tasks = staticmethod(lambda suite: 2)
        instruction = staticmethod(lambda suite, task_id: "go")

    with pytest.raises(ConfigError, match="--instruction swap has no other"):
        instruction_given(cast(Any, OneSentence), "s", 0, "swap")


class Placed:
    """A simulator of one cup that stands elsewhere with another env seed than 0."""

    env_seed = 3

    def __init__(self, place: list[float], elsewhere: list[float]) -> None:
        self.known = {0: place, self.env_seed: elsewhere}

    def reset(self, state: int, *, settle: int) -> None:
        self.place = np.array(self.known[self.env_seed])

    def places(self) -> dict[str, np.ndarray]:
        return {"cup": self.place}


HALF = np.radians(5.0)


@pytest.mark.parametrize(
    ("place", "elsewhere", "moved"),
    [
        ([0, 0, 0, 1, 0, 0, 0], [6e-4, 0, 0, 1, 0, 0, 0], 0.6),
        ([0, 0, 0, 1, 0, 0, 0], [4e-4, 0, 0, 1, 0, 0, 0], None),  # what hardly moves stands still
        ([0, 0, 0, 0.6, 0, 0, 0.8], [0, 0, 0, -0.6, 0, 0, -0.8], None),  # one attitude
        ([0, 0, 0, 1, 0, 0, 0], [0, 0, 0, np.cos(HALF), 0, 0, np.sin(HALF)], 100 * 2 * HALF),  # a turn is a move
    ],
)
def test_what_the_env_seed_moves_is_named(place: list[float], elsewhere: list[float], moved: float | None) -> None:
    expected = {} if moved is None else {"cup": pytest.approx(moved, abs=0.1)}
    assert moved_by_seed(cast(Any, Placed(place, elsewhere)), settle=0) == expected


def test_the_env_seed_is_put_back() -> None:
    sim = FakeSimulator("fake", 0, env_seed=9)
    assert moved_by_seed(sim, settle=0) == {"point": 9.0}  # mm; the goal stands still
    assert sim.env_seed == 9
