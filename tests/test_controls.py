"""controls.py: what a policy is told, what an env seed moved, which neighbouring runs stand beside a score."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from prismatic.episodes.controls import beside, instruction_given, moved_by_seed
from prismatic.errors import ConfigError
from prismatic.scene import suites
from tests.fake_simulator import FakeSimulator

LIBERO = suites.Libero()


def test_instructions_of_a_policy_that_may_not_read() -> None:
    given = [instruction_given(LIBERO, "libero_goal", 7, kind) for kind in ("empty", "swap", "paraphrase")]
    assert given == ["", suites.instruction("libero_goal", 8), "switch on the stove"]  # the last is LIBERO-PRO's
    assert instruction_given(LIBERO, "libero_goal", 9, "swap") == suites.instruction("libero_goal", 0)
    top = "close the top drawer of the cabinet"  # LIBERO-90 has no wording of LIBERO-PRO's
    assert suites.instruction("libero_90", 0) == top
    assert instruction_given(LIBERO, "libero_90", 0, "paraphrase") == top.replace("close", "shut")


def test_every_tasks_other_sentence_differs() -> None:
    for suite in suites.STEP_LIMITS:
        for task in range(suites.num_tasks(suite)):
            own = suites.instruction(suite, task)
            for kind in ("swap", "paraphrase"):
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


def write_run(folder: Path, successes: int, failures: int, **identity: Any) -> dict[str, Any]:
    folder.mkdir(parents=True)
    whole = {"task_suite_name": "s", "env_seed": 0, "num_steps_wait": 10, "step_limit": 220} | identity
    counts = {"successes": successes, "failures": failures, "errors": 1}  # the same in both tasks
    (folder / "summary.json").write_text(json.dumps({"per_task": [{"task_id": task} | counts for task in (0, 1)]}))
    (folder / "run.json").write_text(json.dumps({"identity": whole, "record": {}}))
    return whole


def test_controls_of_the_same_episodes_stand_beside(tmp_path: Path) -> None:
    own = write_run(tmp_path / "own", 5, 5, policy="checkpoint", weights="w")
    zero = write_run(tmp_path / "zero", 0, 4, policy="zero")
    write_run(tmp_path / "random-few", 1, 1, policy="random", seed=1)
    write_run(tmp_path / "random-many", 1, 9, policy="random", seed=2)
    write_run(tmp_path / "expert-elsewhere", 9, 0, policy="expert", env_seed=1)
    write_run(tmp_path / "swap", 4, 6, policy="checkpoint", weights="w", instruction="swap")
    write_run(tmp_path / "swap-other", 0, 99, policy="checkpoint", weights="other", instruction="swap")
    write_run(tmp_path / "twin", 9, 1, policy="checkpoint", weights="w", note="x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    found = beside(tmp_path / "own", own, task_ids={1})
    assert {name: (result["successes"], result["judged"], result["folder"]) for name, result in found.items()} == {
        "zero": (0, 4, "zero"),
        "random": (1, 10, "random-many"),
        "instruction swap": (4, 10, "swap"),
    }
    later = own | {"benchmark_files": "0123"}  # a run of today beside controls of before that was recorded
    assert beside(tmp_path / "own", later, task_ids={1}) == found
    assert found["zero"]["interval_95"] == pytest.approx([0.0, 0.4899], abs=1e-4)
    assert beside(tmp_path / "own", own, task_ids={7}) == {}
    assert "zero" not in beside(tmp_path / "zero", zero, task_ids={0})
