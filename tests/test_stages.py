"""stages.py against LIBERO's own task files: every predicate of every suite has stages. Only parsed, nothing is built."""

from collections import Counter

import pytest

from prismatic.scene import suites
from prismatic.scene.diagnosis import NOT_ENOUGH, SENTENCES
from prismatic.scene.trajectory import MOVE_STAGES, MOVING, PLACE_STAGES, PLACING, Goal


@pytest.fixture(scope="module")
def goals() -> dict[str, list[list[Goal]]]:
    """Suite → its tasks' goals, for all suites that the simulator's package brings."""
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    return {
        suite: [
            [Goal(*state) for state in robosuite_parse_problem(str(suites.bddl_file(suite, task)))["goal_state"]]
            for task in range(suites.num_tasks(suite))
        ]
        for suite in suites.suites()
    }


def test_every_predicate_of_every_suite_has_stages(goals: dict[str, list[list[Goal]]]) -> None:
    assert set(suites.STEP_LIMITS) <= set(goals)
    found = Counter(goal.predicate for tasks in goals.values() for task in tasks for goal in task)
    assert set(found) == {*PLACING, *MOVING}
    for tasks in goals.values():
        for task in tasks:
            assert task
            for goal in task:
                assert goal.stage_names() == (PLACE_STAGES if goal.target else MOVE_STAGES)
    assert set(NOT_ENOUGH) == set(SENTENCES) == set(MOVING)


def test_a_goals_subject_names_it(goals: dict[str, list[list[Goal]]]) -> None:
    """Where a task has several goals, their stages are told apart by the subject."""
    several = 0
    for tasks in goals.values():
        for task in tasks:
            assert len({goal.subject for goal in task}) == len(task)
            several += len(task) > 1
    assert several >= 20


def test_another_predicate_has_at_least_its_own_truth() -> None:
    assert Goal("up", "cup_1").stage_names() == ("predicate_held",)
