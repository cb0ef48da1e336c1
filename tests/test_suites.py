"""suites.py: every task of LIBERO's five suites and of LIBERO-PRO's sixteen, as eval.py plans it."""

import numpy as np
import pytest

from prismatic.episodes.trials import list_trials
from prismatic.scene import suites

PARENTS = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
PRO = [f"{parent}_{kind}" for parent in PARENTS for kind in ("lan", "object", "swap", "task")]


def test_all_of_them_are_there() -> None:
    assert set(suites.suites()) >= {*PARENTS, "libero_90", *PRO}


@pytest.mark.parametrize("suite", [*PARENTS, "libero_90", *PRO])
def test_every_task_can_be_planned(suite: str) -> None:
    trials = list_trials(suites.Libero(), suite, num_trials=50)
    assert len(trials) == 50 * suites.num_tasks(suite) == 50 * (90 if suite == "libero_90" else 10)
    assert (
        suites.step_limit(suite)
        == suites.STEP_LIMITS[suite if suite in suites.STEP_LIMITS else suite.rsplit("_", 1)[0]]
    )
    for task_id in range(suites.num_tasks(suite)):
        words = suites.instruction(suite, task_id)
        assert words == words.strip() and len(words.split()) >= 3 and "_" not in words
        scene = suites.bddl_file(suite, task_id).read_text()
        assert "(:goal" in scene and "(:language" in scene
        states = suites.init_states(suite, task_id)
        assert states.shape[0] == 50 and states.dtype == np.float64 and np.isfinite(states).all()
        assert len(np.unique(states, axis=0)) > 1


def test_the_reworded_suites_say_something_else() -> None:
    for parent in PARENTS:
        for kind, fewest in (("lan", 8), ("task", 8), ("swap", 0), ("object", 0)):
            told = [
                (suites.instruction(f"{parent}_{kind}", task), suites.instruction(parent, task)) for task in range(10)
            ]
            changed = sum(new != old for new, old in told)
            assert changed >= fewest and (fewest or changed == 0), (parent, kind, told)
