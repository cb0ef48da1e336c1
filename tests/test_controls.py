"""controls.py: what a policy is told, what an env seed moved, which neighbouring runs stand beside a score."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from prismatic.episodes.controls import beside, instruction_given, moved_by_seed
from prismatic.errors import ConfigError
from prismatic.scene import suites
from tests import fake_simulator


def test_instructions_of_a_policy_that_may_not_read() -> None:
    own = suites.instruction("libero_goal", 7)
    assert own == "turn on the stove"
    given = {
        kind: instruction_given(suites.Libero(), "libero_goal", 7, kind)
        for kind in ("keep", "empty", "swap", "paraphrase")
    }
    assert given == {
        "keep": own,
        "empty": "",
        "swap": suites.instruction("libero_goal", 8),
        "paraphrase": "switch on the stove",  # LIBERO-PRO's
    }


def test_swap_wraps_around_and_skips_a_twin() -> None:
    assert instruction_given(suites.Libero(), "libero_goal", 9, "swap") == suites.instruction("libero_goal", 0)
    told = {task: instruction_given(suites.Libero(), "libero_90", task, "swap") for task in range(90)}
    assert all(told[task] != suites.instruction("libero_90", task) for task in told)

    class OneSentence:
        num_tasks = staticmethod(lambda suite: 2)
        instruction = staticmethod(lambda suite, task_id: "go")

    with pytest.raises(ConfigError, match="--instruction swap has no other"):
        instruction_given(cast(Any, OneSentence), "s", 0, "swap")


def test_every_task_has_a_paraphrase_that_differs() -> None:
    same = [
        (suite, task)
        for suite in suites.STEP_LIMITS
        for task in range(suites.num_tasks(suite))
        if instruction_given(suites.Libero(), suite, task, "paraphrase") == suites.instruction(suite, task)
    ]
    assert same == []
    top = "close the top drawer of the cabinet"  # LIBERO-90 has no wording of LIBERO-PRO's
    assert suites.instruction("libero_90", 0) == top
    assert instruction_given(suites.Libero(), "libero_90", 0, "paraphrase") == top.replace("close", "shut")


def test_what_the_env_seed_moves_is_named() -> None:
    sim = fake_simulator.FakeSimulator("fake", 0, env_seed=9)
    assert moved_by_seed(sim, settle=0) == {"point": 9.0}  # mm; the goal stands still
    assert sim.env_seed == 9
    sim.env_seed = 0
    assert moved_by_seed(sim, settle=0) == {}


def test_what_hardly_moves_stands_still() -> None:
    class Shifted:
        env_seed = 3

        def reset(self, state: int, *, settle: int) -> None:
            self.shift = 1e-3 if self.env_seed else 0.0

        def places(self) -> dict[str, np.ndarray]:
            upright = np.array([1.0, 0, 0, 0])
            return {name: np.append([self.shift * far, 0, 0], upright) for name, far in (("cup", 0.4), ("stove", 0.6))}

    assert moved_by_seed(cast(Any, Shifted()), settle=0) == {"stove": 0.6}


def test_a_quaternion_and_its_negative_are_one_attitude() -> None:
    class Renamed:
        env_seed = 3

        def reset(self, state: int, *, settle: int) -> None:
            self.sign = -1.0 if self.env_seed else 1.0

        def places(self) -> dict[str, np.ndarray]:
            return {"cup": np.array([0, 0, 0, 0.6 * self.sign, 0, 0, 0.8 * self.sign])}

    assert moved_by_seed(cast(Any, Renamed()), settle=0) == {}


def test_a_turn_counts_as_a_move() -> None:
    class Turned:
        env_seed = 3

        def reset(self, state: int, *, settle: int) -> None:
            half = np.radians(5.0) if self.env_seed else 0.0
            self.cabinet = np.array([0, 0, 0, np.cos(half), 0, 0, np.sin(half)])

        def places(self) -> dict[str, np.ndarray]:
            return {"cabinet": self.cabinet}

    assert moved_by_seed(cast(Any, Turned()), settle=0) == {"cabinet": pytest.approx(100 * np.radians(10.0), abs=0.1)}


def write_run(folder: Path, successes: int, failures: int, **identity: Any) -> dict[str, Any]:
    folder.mkdir(parents=True)
    whole = {"task_suite_name": "s", "env_seed": 0, "num_steps_wait": 10, "step_limit": 220} | identity
    per_task = [
        {"task_id": task, "successes": successes, "failures": failures, "errors": 1} for task in (0, 1)
    ]  # the same in both
    (folder / "summary.json").write_text(json.dumps({"per_task": per_task}))
    (folder / "run.json").write_text(json.dumps({"identity": whole, "record": {}}))
    return whole


def test_controls_of_the_same_episodes_stand_beside(tmp_path: Path) -> None:
    own = write_run(tmp_path / "own", 5, 5, policy="checkpoint", weights="w")
    write_run(tmp_path / "zero", 0, 4, policy="zero")
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
    zero = json.loads((tmp_path / "zero" / "run.json").read_text())["identity"]
    assert "zero" not in beside(tmp_path / "zero", zero, task_ids={0})
