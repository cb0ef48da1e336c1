"""trajectory.py and diagnosis.py on trajectories of made-up episodes (drawn_trajectory.py), and against LIBERO's own task files."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from prismatic.scene import suites
from prismatic.scene.diagnosis import NOT_ENOUGH, SENTENCES, diagnose
from prismatic.scene.trajectory import MOVE_STAGES, MOVING, PLACE_STAGES, PLACING, Goal, JointGoal, Place, Trajectory
from prismatic.summary import funnel
from tests.conftest import REPOSITORY
from tests.drawn_results import row
from tests.drawn_trajectory import CUP, JUG, ON_PLATE, PLATE, T, grasp, hand_at, scene

UP, OVER_PLATE = {40: (0.0, 0.0, 0.2)}, {40: (0.0, 0.0, 0.2), 60: (0.4, 0.02, 0.2)}
TO_JUG = {40: (0.0, 0.0, 0.1), 60: (0.3, 0.3, 0.1)}
TOUCHED = np.zeros((T + 1, 5, 3), bool)
TOUCHED[30:40, CUP, 2] = True
SHUT = np.where(np.isin(np.arange(T + 1), [*range(30, 40), *range(60, 70)]), 0.001, 0.05)
SWING, AWAY = {"hand": hand_at((0.0, 0.0, 0.07))}, {"hand": hand_at((0.0, 0.0, 0.5))}
OPEN_DRAWER = JointGoal(part=0, end=-0.14, sign=-1.0)
INTO_DRAWER = Goal("in", "cup_1", "chest_1_top_region", Place("chest_1", *[np.full(3, 0.1)] * 2), OPEN_DRAWER)
LINE = np.linspace(0, 1, T + 1)


def pushed(tipped: bool = False, **changes: Any) -> Trajectory:
    base = scene(touch=TOUCHED, hand=hand_at((0.0, 0.0, 0.05)), **changes)
    base.places[40:, CUP] = (0.0, 0.02 if tipped else 0.08, 0.0)
    if tipped:
        base.upright[40:, CUP] = (0.0, 1.0, 0.1)
    return base


def changed(trajectory: Trajectory, name: str, where: Any, value: Any) -> Trajectory:
    getattr(trajectory, name)[where] = value
    return trajectory


def part(
    predicate: str, values: np.ndarray, *, touched: bool = True, near: bool = True, which: int = 0, joint: Any = None
) -> Trajectory:
    """A drawer or door that should be opened to -0.14, or shut from there; `values` (T + 1,) are part `which`'s."""
    joint = joint or (OPEN_DRAWER if predicate == "open" else JointGoal(part=0, end=0.0, sign=1.0))
    name = "chest_1_top_region" if joint.part == 0 else "oven_1"
    trajectory = scene(goals=[Goal(predicate, name, joint=joint)], **AWAY)
    trajectory.values[:, which] = values
    trajectory.touch[20:, 3, 2] = touched
    trajectory.part_gap[10:, 0] = 0.02 if near else 0.3
    return trajectory


def two_goals(*, first_held: Any = slice(0, 0), second_held: Any = slice(0, 0), **changes: Any) -> Trajectory:
    """To open the drawer, and to put the cup, which is dropped, on the plate."""
    held = np.zeros((T + 1, 2), bool)
    held[first_held, 0] = held[second_held, 1] = True
    trajectory = grasp(CUP, UP, stop=50)
    offset = np.zeros((T + 1, 2, 3))
    offset[:, 1] = trajectory.places[:, CUP] - trajectory.places[:, PLATE]
    goals = [Goal("open", "chest_1_top_region", joint=OPEN_DRAWER), ON_PLATE]
    return replace(trajectory, **{"goals": goals, "supports": [[], []], "held": held, "offset": offset} | changes)


AT_REST = {"stop": 80, "rest": (0.4, 0.0, 0.1)}
ZONE = Goal("on", "cup_1", "table_front_region", Place(None, *[np.array([0.04, 0.04, 0.01])] * 2))
FAILURES: dict[str, tuple[Trajectory, str, str]] = {
    "zero policy": (scene(), "idle", "Stood still for the last 120 of 120 steps, 46.0 cm from the cup, the gripper open."),
    "far away": (scene(**AWAY), "never_near", "Never came near: at best 46.0 cm"),
    "hovering": (scene(**SWING), "never_grasped", "Came near (at best 3.0 cm"),
    "empty grasps": (scene(**SWING, opening=SHUT, closing=SHUT < 0.01),
        "closed_beside", "Closed the gripper on nothing 2 times, 3.0 cm from the cup at step 30"),
    "empty grasps far away": (scene(**AWAY, opening=SHUT, closing=SHUT < 0.01), "never_near", "Never came near"),
    "pushed": (pushed(), "pushed_away", "Pushed the cup 8.0 cm away"),
    "tipped over": (pushed(tipped=True), "pushed_away", "and tipped it over"),
    "other lifted": (grasp(JUG, {40: (0.3, 0.3, 0.2)}), "wrong_object", "Lifted the jug instead of the cup"),
    "its twin": (replace(grasp(JUG, {40: (0.3, 0.3, 0.2)}), objects=["cup_1", "cup_2", "plate_1"]),
        "wrong_object", "Lifted the cup 2 instead of the cup"),
    "not lifted": (grasp(CUP, {40: (0.0, 0.0, 0.01)}), "not_lifted", "Grasped the cup at step 20"),
    "dragged": (grasp(CUP, {40: (0.1, 0.0, 0.01)}, rest=(0.1, 0.0, 0.0)),
        "not_lifted", "never lifted it by 2 cm; it ended 10.0 cm from where it stood"),
    "let go high up": (grasp(CUP, UP, stop=50), "dropped", "at step 50, 40.0 cm from the plate: the gripper opened"),
    "slipped": (changed(grasp(CUP, UP, stop=50), "closing", slice(50, None), True),
        "dropped", "it slipped out of the closed gripper; it fell 20.0 cm"),
    "kept": (grasp(CUP, UP), "not_carried", "Still held the cup at the end, 40.0 cm from the plate"),
    "kept beside a region": (replace(grasp(CUP, UP), goals=[replace(ON_PLATE, target="basket_1_contain_region")]),
        "not_carried", "40.0 cm from the basket;"),
    "kept over it": (grasp(CUP, OVER_PLATE), "never_released", "over the plate from step"),
    "beside it": (replace(grasp(CUP, OVER_PLATE, stop=80, rest=(0.45, 0.0, 0.0)), supports=[["plate_1"]]),
        "beside_target", "5.0 cm from the middle of the plate, 2.0 cm more than LIBERO allows"),
    "beside a zone": (pushed(goals=[ZONE], offset=np.tile([0.06, 0, 0], (T + 1, 1, 1))),
        "beside_target", "6.0 cm from the middle of the table front, 2.0 cm more than LIBERO allows, and was never grasped"),
    "at it": (grasp(CUP, OVER_PLATE, stop=80, rest=(0.41, 0.0, 0.1)), "never_held", "10.0 cm above its middle"),
    "on the jug": (replace(grasp(CUP, TO_JUG, stop=80, rest=(0.3, 0.3, 0.08)), supports=[["jug_1"]]),
        "wrong_target", "it rests on the jug, not on the plate"),
    "in a shut drawer": (changed(replace(grasp(CUP, OVER_PLATE, **AT_REST), goals=[INTO_DRAWER]), "values", (slice(30, None), 0), -0.08),
        "not_open_enough", "by 14.0 cm; it got 8.0 cm far"),
    "in an open drawer": (changed(replace(grasp(CUP, OVER_PLATE, **AT_REST), goals=[INTO_DRAWER]), "values", (slice(30, None), 0), -0.15),
        "never_held", "10.0 cm above its middle"),
    "half open": (part("open", -0.08 * LINE), "not_open_enough", "by 14.0 cm; it got 8.0 cm far"),
    "and back": (part("open", -0.08 * np.sin(np.pi * LINE)), "not_open_enough", "and ended at 0.0 cm"),
    "half shut": (part("close", -0.15 + 0.1 * LINE), "not_closed_enough", "by 15.0 cm; it got 10.0 cm far"),
    "a knob": (part("turnon", 0.25 * LINE, which=1, joint=JointGoal(part=1, end=0.5, sign=1.0)),
        "not_turned_enough", "The oven was to be turned on, by 29 degrees; it got 14 degrees far"),
    "another part": (part("open", 0.5 * LINE, which=1), "wrong_part", "Moved the oven door by 29 degrees"),
    "touched": (part("open", 0 * LINE), "not_moved", "Touched the chest top at step 20"),
    "near": (part("open", 0 * LINE, touched=False), "never_touched", "at best 2.0 cm from the chest top"),
    "far": (part("open", 0 * LINE, touched=False, near=False), "never_near", "at best 30.0 cm"),
    "none of two": (two_goals(), "dropped", "0 of 2 goals held at the end. Dropped the cup"),  # four of seven stages, not none of four
    "one of two": (two_goals(first_held=slice(60, None)), "dropped", "1 of 2 goals held at the end."),
    "the other goal's thing": (two_goals(second_held=slice(60, None)), "idle", "1 of 2 goals"),  # it is no wrong object
    "undone": (two_goals(first_held=slice(60, 90), second_held=slice(100, None)),
        "undone", "1 of 2 goals held at the end. The chest top was opened at step 60, but no longer from step 90 on"),
    "nobody's thing": (two_goals(second_held=slice(60, None), goals=[two_goals().goals[0], Goal("on", "jug_1", "plate_1")]),
        "wrong_object", "Lifted the cup and never touched the chest top"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_has_its_verdict_and_reason(name: str) -> None:
    trajectory, verdict, words = FAILURES[name]
    found = diagnose(trajectory, success=False)
    assert found.verdict == verdict
    assert words in found.reason and found.reason.endswith(".")
    stages = [step for goal, step in found.stages.items() if goal.endswith("predicate_held")]
    assert [step is None for step in stages] == (~trajectory.held.any(axis=0)).tolist()


def test_stages_of_a_success() -> None:
    trajectory = grasp(CUP, OVER_PLATE, stop=80, rest=(0.4, 0.0, 0.0))
    trajectory.held[90:] = True
    found = diagnose(trajectory, success=True)
    assert (found.verdict, found.reason) == ("success", "Solved in 120 steps.")
    # carried: 3 of 20 steps before the middle it is 6 cm off, within the outline and 1 cm
    assert found.stages == {
        **{"approached": 15, "touched": 20, "grasped": 20, "lifted": 22, "carried": 57, "released": 80},
        "predicate_held": 90,
    }
    assert list(found.stages) == list(PLACE_STAGES)


def test_stages_of_a_drawer_a_zone_and_two_goals() -> None:
    into = {name: diagnose(FAILURES[f"in {name}"][0], success=False).stages for name in ("a shut drawer", "an open drawer")}  # fmt: skip
    assert {name: (next(iter(stages)), stages["opened"]) for name, stages in into.items()} == {
        "a shut drawer": ("opened", None),
        "an open drawer": ("opened", 30),
    }
    zone = FAILURES["beside a zone"][0]
    zone.offset[60:] = 0.01
    assert diagnose(zone, success=False).stages["carried"] == 60  # a push needs no grasp
    both = diagnose(two_goals(), success=False).stages
    assert (both["cup_1: lifted"], both["chest_1_top_region: touched"]) == (22, None)
    assert list(diagnose(FAILURES["a knob"][0], success=False).stages) == list(MOVE_STAGES)


def test_what_is_a_grasp_and_that_a_flicker_of_the_contact_is_no_end_of_it() -> None:
    trajectory = grasp(CUP, OVER_PLATE)
    trajectory.touch[45:47, CUP, 0] = False
    found = diagnose(trajectory, success=False)
    assert found.verdict == "never_released" and found.stages["released"] is None
    trajectory.touch[45:49, CUP, 0] = False
    assert trajectory.lifts(CUP)[0][1] == 45
    trajectory = grasp(CUP, {40: (0.0, 0.0, 0.2)})
    assert not replace(trajectory, opening=np.full(T + 1, 0.002)).grasps(CUP)  # nothing is between the fingers
    assert not replace(trajectory, opening=np.linspace(0.5, 0.0, T + 1)).grasps(CUP)  # they are still closing
    rim = grasp(CUP, {40: (0.0, 0.0, 0.01)})
    rim.opening[20:] = 0.0036
    found = diagnose(rim, success=False)
    assert (found.verdict, found.stages["grasped"]) == ("not_lifted", 21)
    rim.touch[:, CUP, 1] = False  # beside the rim, not around it
    assert diagnose(rim, success=False).verdict == "closed_beside"


def test_a_hand_that_rises_while_it_closes_lifts_from_where_the_thing_stood() -> None:
    trajectory = grasp(CUP, {25: (0.0, 0.0, 0.0)})
    trajectory.places[15:20, CUP, 2] = np.linspace(0, 0.015, 5)  # on one finger, before the other is there
    trajectory.places[20:, CUP, 2] = 0.024
    assert diagnose(trajectory, success=False).stages["lifted"] == 20
    trajectory.places[5:20, CUP, 2] = 0.015  # long before
    assert diagnose(trajectory, success=False).stages["lifted"] is None


def test_funnel_counts_what_has_the_stage() -> None:
    given: list[dict[str, Any]] = [
        {"touched": 3, "grasped": None, "predicate_held": None},
        {"touched": 3, "grasped": 7, "predicate_held": 9},
        {"a: touched": 3, "b: touched": None, "a: moved": 4, "a: predicate_held": 5, "b: predicate_held": None},
        {},  # crashed, or written before there were stages
    ]
    found = funnel([row(0, 0, False, stages=stages) for stages in given])
    assert found == {
        "touched": {"episodes": 3, "reached": 2, "share": 2 / 3},
        "grasped": {"episodes": 2, "reached": 1, "share": 0.5},
        "moved": {"episodes": 1, "reached": 1, "share": 1.0},
        "predicate_held": {"episodes": 3, "reached": 1, "share": 1 / 3},
    }
    assert list(found) == ["touched", "grasped", "moved", "predicate_held"]


def test_every_verdict_of_the_table_is_earned_here() -> None:
    page = (REPOSITORY / "docs" / "verdicts.md").read_text().partition("## Verdicts")[2]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    codes = {code.strip() for row in rows for code in row.split(",") if re.fullmatch(r"[a-z_]+", code.strip())}
    assert codes - {"verdict", "error", "success"} == {verdict for _, verdict, _ in FAILURES.values()}


def test_every_predicate_of_every_suite_has_stages_and_where_there_are_several_a_subject_of_its_own() -> None:
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    found, several = set(), 0
    for suite in suites.suites():
        for task in range(suites.num_tasks(suite)):
            states = robosuite_parse_problem(str(suites.bddl_file(suite, task)))["goal_state"]
            goals = [Goal(*state) for state in states]
            assert goals and len({goal.subject for goal in goals}) == len(goals)
            several += len(goals) > 1
            for goal in goals:
                assert goal.stage_names() == (PLACE_STAGES if goal.target else MOVE_STAGES)
                found.add(goal.predicate)
    assert found == {*PLACING, *MOVING} and several >= 20
    assert set(NOT_ENOUGH) == set(SENTENCES) == set(MOVING)
    assert Goal("up", "cup_1").stage_names() == ("predicate_held",)
