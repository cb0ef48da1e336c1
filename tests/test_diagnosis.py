"""stages.py and verdicts.py on trajectory of made-up episodes (drawn_trajectory.py)."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from prismatic.scene import diagnosis
from prismatic.scene.diagnosis import diagnose
from prismatic.scene.stages import named
from prismatic.scene.trajectory import Goal, JointGoal, Target, Trajectory
from prismatic.summary import funnel
from tests.drawn_results import row
from tests.drawn_trajectory import CUP, JUG, ON_PLATE, PLATE, T, grasp, hand_at, scene
from tests.scripted_failures import CASES

UP, OVER_PLATE = {40: (0.0, 0.0, 0.2)}, {40: (0.0, 0.0, 0.2), 60: (0.4, 0.02, 0.2)}
TOUCHED = np.zeros((T + 1, 5, 3), bool)
TOUCHED[30:40, CUP, 2] = True
SHUT = np.where(np.isin(np.arange(T + 1), [*range(30, 40), *range(60, 70)]), 0.001, 0.05)
SWING = {"hand": hand_at((0.0, 0.0, 0.07))}


def pushed(tipped: bool = False) -> Trajectory:
    base = scene(touch=TOUCHED, hand=hand_at((0.0, 0.0, 0.05)))
    base.places[40:, CUP] = (0.0, 0.02 if tipped else 0.08, 0.0)
    if tipped:
        base.upright[40:, CUP] = (0.0, 1.0, 0.1)
    return base


PLACING: dict[str, tuple[Trajectory, str, str]] = {
    "zero policy": (scene(), "idle", "Stood still for the last 120 of 120 steps, 46.0 cm from the cup, the gripper open."),
    "far away": (scene(hand=hand_at((0, 0, 0.5))), "never_near", "Never came near: at best 46.0 cm"),
    "hovering": (scene(**SWING), "never_grasped", "Came near (at best 3.0 cm"),
    "empty grasps": (
        scene(**SWING, opening=SHUT, closing=SHUT < 0.01),
        "closed_beside",
        "Closed the gripper on nothing 2 times, 3.0 cm from the cup at step 30",
    ),
    "empty grasps far away": (
        scene(hand=hand_at((0, 0, 0.5)), opening=SHUT, closing=SHUT < 0.01),
        "never_near",
        "Never came near",
    ),
    "pushed": (pushed(), "pushed_away", "Pushed the cup 8.0 cm away"),
    "tipped over": (pushed(tipped=True), "pushed_away", "and tipped it over"),
    "other lifted": (grasp(JUG, {40: (0.3, 0.3, 0.2)}), "wrong_object", "Lifted the jug instead of the cup"),
    "not lifted": (grasp(CUP, {40: (0.0, 0.0, 0.01)}), "not_lifted", "Grasped the cup at step 20"),
    "let go high up": (grasp(CUP, UP, stop=50), "dropped", "at step 50, 40.0 cm from the plate: the gripper opened"),
    "kept": (grasp(CUP, UP), "not_carried", "Still held the cup at the end, 40.0 cm from the plate"),
    "kept over it": (grasp(CUP, OVER_PLATE), "never_released", "over the plate from step"),
    "beside it": (
        replace(grasp(CUP, OVER_PLATE, stop=80, rest=(0.45, 0.0, 0.0)), supports=[["plate_1"]]),
        "beside_target",
        "5.0 cm from the middle of the plate, 2.0 cm more than LIBERO allows",
    ),
    "at it": (grasp(CUP, OVER_PLATE, stop=80, rest=(0.41, 0.0, 0.1)), "never_held", "10.0 cm above its middle"),
    "on the jug": (
        replace(grasp(CUP, {40: (0, 0, 0.1), 60: (0.3, 0.3, 0.1)}, stop=80, rest=(0.3, 0.3, 0.08)), supports=[["jug_1"]]),
        "wrong_target",
        "it rests on the jug, not on the plate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACING)
def test_placing(name: str) -> None:
    trajectory, verdict, words = PLACING[name]
    found = diagnose(trajectory, success=False)
    assert found.verdict == verdict
    assert words in found.reason
    assert found.stages["predicate_held"] is None


def test_stages_of_a_success() -> None:
    trajectory = grasp(CUP, OVER_PLATE, stop=80, rest=(0.4, 0.0, 0.0))
    trajectory.held[90:] = True
    found = diagnose(trajectory, success=True)
    assert (found.verdict, found.reason) == ("success", "Solved in 120 steps.")
    assert list(found.stages) == [
        "approached", "touched", "grasped", "lifted", "carried", "released", "predicate_held",
    ]  # fmt: skip
    assert (found.stages["approached"], found.stages["touched"], found.stages["grasped"]) == (15, 20, 20)
    assert (found.stages["lifted"], found.stages["released"], found.stages["predicate_held"]) == (22, 80, 90)
    assert found.stages["carried"] == 57  # 3 of 20 steps before the middle: 6 cm, within the outline and 1 cm


def test_a_slip_is_told_from_an_opened_gripper() -> None:
    trajectory = grasp(CUP, UP, stop=50)
    trajectory.closing[50:] = True
    assert "it slipped out of the closed gripper; it fell 20.0 cm" in diagnose(trajectory, success=False).reason


def test_a_flicker_of_the_contact_is_no_end_of_a_grasp() -> None:
    trajectory = grasp(CUP, OVER_PLATE)
    trajectory.touch[45:47, CUP, 0] = False
    found = diagnose(trajectory, success=False)
    assert found.verdict == "never_released"
    assert found.stages["carried"] is not None
    assert found.stages["released"] is None
    trajectory.touch[45:49, CUP, 0] = False
    assert trajectory.lifts(CUP)[0][1] == 45


def test_fingers_that_press_on_a_thing_while_they_close_hold_nothing() -> None:
    trajectory = grasp(CUP, {40: (0.0, 0.0, 0.2)})
    assert not replace(trajectory, opening=np.full(T + 1, 0.002)).grasps(CUP)
    assert not replace(trajectory, opening=np.linspace(0.5, 0.0, T + 1)).grasps(CUP)


def test_a_thin_rim_between_the_fingers_is_a_grasp_and_no_empty_one() -> None:
    trajectory = grasp(CUP, {40: (0.0, 0.0, 0.01)})
    trajectory.opening[20:] = 0.0036
    found = diagnose(trajectory, success=False)
    assert (found.verdict, found.stages["grasped"]) == ("not_lifted", 21)
    trajectory.touch[:, CUP, 1] = False  # beside the rim, not around it
    assert diagnose(trajectory, success=False).verdict == "closed_beside"


def test_a_hand_that_rises_while_it_closes_lifts_from_where_the_thing_stood() -> None:
    trajectory = grasp(CUP, {25: (0.0, 0.0, 0.0)})
    trajectory.places[15:20, CUP, 2] = np.linspace(0, 0.015, 5)  # on one finger, before the other is there
    trajectory.places[20:, CUP, 2] = 0.024
    assert diagnose(trajectory, success=False).stages["lifted"] == 20
    trajectory.places[5:20, CUP, 2] = 0.015  # long before
    assert diagnose(trajectory, success=False).stages["lifted"] is None


def test_what_was_dragged_says_how_far() -> None:
    trajectory = grasp(CUP, {40: (0.1, 0.0, 0.01)}, rest=(0.1, 0.0, 0.0))
    assert "never lifted it by 2 cm; it ended 10.0 cm from where it stood" in diagnose(trajectory, success=False).reason


def test_a_push_to_a_zone_of_the_table_needs_no_grasp() -> None:
    zone = Target(owner=None, outline=np.array([0.04, 0.04, 0.01]), room=np.array([0.04, 0.04, 0.01]))
    trajectory = replace(pushed(), targets=[zone], goals=[Goal("on", "cup_1", "table_front_region")])
    trajectory.offset[:] = (0.06, 0, 0)
    found = diagnose(trajectory, success=False)
    assert found.verdict == "beside_target"
    assert (
        "6.0 cm from the middle of the table front, 2.0 cm more than LIBERO allows, and was never grasped"
        in found.reason
    )
    trajectory.offset[60:] = 0.01
    assert named(trajectory)["carried"] == 60


# --- parts --------------------------------------------------------------------------------------------------------


def part(predicate: str, values: np.ndarray, *, touched: bool = True, near: bool = True, which: int = 0) -> Trajectory:
    """A drawer or door that should be opened to -0.14, or shut from there; `values` (T + 1,) are part `which`'s."""
    trajectory = scene(
        goals=[Goal(predicate, "chest_1_top_region")],
        targets=[None],
        joint_goals=[
            JointGoal(part=0, end=-0.14, sign=-1.0) if predicate == "open" else JointGoal(part=0, end=0.0, sign=1.0)
        ],
        hand=hand_at((0.0, 0.0, 0.5)),
    )
    trajectory.values[:, which] = values
    trajectory.touch[20:, 3, 2] = touched
    trajectory.part_gap[10:, 0] = 0.02 if near else 0.3
    return trajectory


MOVING: dict[str, tuple[Trajectory, str, str]] = {
    "half open": (part("open", np.linspace(0, -0.08, T + 1)), "not_open_enough", "by 14.0 cm; it got 8.0 cm far"),
    "and back": (
        part("open", -0.08 * np.sin(np.linspace(0, np.pi, T + 1))),
        "not_open_enough",
        "and ended at 0.0 cm",
    ),
    "half shut": (
        part("close", np.linspace(-0.15, -0.05, T + 1)),
        "not_closed_enough",
        "by 15.0 cm; it got 10.0 cm far",
    ),
    "another part": (
        part("open", np.linspace(0, 0.5, T + 1), which=1),
        "wrong_part",
        "Moved the oven door by 29 degrees",
    ),
    "touched": (part("open", np.zeros(T + 1)), "not_moved", "Touched the chest top at step 20"),
    "near": (part("open", np.zeros(T + 1), touched=False), "never_touched", "at best 2.0 cm from the chest top"),
    "far": (part("open", np.zeros(T + 1), touched=False, near=False), "never_near", "at best 30.0 cm"),
}


@pytest.mark.parametrize("name", MOVING)
def test_moving(name: str) -> None:
    trajectory, verdict, words = MOVING[name]
    found = diagnose(trajectory, success=False)
    assert found.verdict == verdict
    assert words in found.reason


def test_a_knob_is_told_in_degrees() -> None:
    trajectory = replace(
        part("open", np.linspace(0, 0.25, T + 1), which=1),
        goals=[Goal("turnon", "oven_1")],
        joint_goals=[JointGoal(part=1, end=0.5, sign=1.0)],
    )
    found = diagnose(trajectory, success=False)
    assert found.verdict == "not_turned_enough"
    assert found.reason.startswith("The oven was to be turned on, by 29 degrees; it got 14 degrees far")
    assert list(found.stages) == ["approached", "touched", "moved", "predicate_held"]


@pytest.mark.parametrize(("opened", "verdict"), [(-0.08, "not_open_enough"), (-0.15, "never_held")])
def test_what_goes_into_a_drawer_needs_it_open(opened: float, verdict: str) -> None:
    trajectory = grasp(CUP, OVER_PLATE, stop=80, rest=(0.4, 0.0, 0.1))
    drawer = Target(
        owner="chest_1",
        outline=np.array([0.1, 0.1, 0.1]),
        room=np.array([0.1, 0.1, 0.1]),
        joint_goal=JointGoal(part=0, end=-0.14, sign=-1.0),
    )
    trajectory.values[30:, 0] = opened
    found = diagnose(
        replace(trajectory, goals=[Goal("in", "cup_1", "chest_1_top_region")], targets=[drawer]), success=False
    )
    assert found.verdict == verdict
    assert next(iter(found.stages)) == "opened"
    assert (found.stages["opened"] is None) == (verdict == "not_open_enough")


# --- several goals ------------------------------------------------------------------------------------------------


def two_goals(*, first_held: Any, second_held: Any) -> Trajectory:
    trajectory = replace(
        grasp(CUP, UP, stop=50),
        goals=[Goal("open", "chest_1_top_region"), ON_PLATE],
        targets=[None, scene().targets[0]],
        joint_goals=[JointGoal(part=0, end=-0.14, sign=-1.0), None],
        supports=[[], []],
    )
    held = np.zeros((T + 1, 2), bool)
    held[first_held, 0] = held[second_held, 1] = True
    offset = np.zeros((T + 1, 2, 3))
    offset[:, 1] = trajectory.places[:, CUP] - trajectory.places[:, PLATE]
    return replace(trajectory, held=held, offset=offset)


def test_of_several_goals_the_one_that_got_furthest_is_judged() -> None:
    nowhere = slice(0, 0)
    found = diagnose(two_goals(first_held=nowhere, second_held=nowhere), success=False)
    assert found.verdict == "dropped"  # four of seven stages, not none of four
    assert found.reason.startswith("0 of 2 goals held at the end. Dropped the cup")
    assert found.stages["cup_1: lifted"] == 22
    assert found.stages["chest_1_top_region: touched"] is None
    found = diagnose(two_goals(first_held=slice(60, None), second_held=nowhere), success=False)
    assert found.verdict == "dropped"
    assert found.reason.startswith("1 of 2 goals held at the end.")


def test_what_was_lifted_for_another_goal_is_no_wrong_object() -> None:
    trajectory = two_goals(first_held=slice(0, 0), second_held=slice(60, None))
    assert diagnose(trajectory, success=False).verdict == "idle"  # the drawer's goal is left, the cup had its own
    base = scene()
    trajectory = replace(
        trajectory, goals=[trajectory.goals[0], Goal("on", "jug_1", "plate_1")], held=np.zeros((T + 1, 2), bool)
    )
    trajectory.held[60:, 1] = True
    found = diagnose(replace(trajectory, hand=base.hand), success=False)
    assert (found.verdict, "Lifted the cup" in found.reason) == ("wrong_object", True)


def test_a_region_is_called_by_what_it_belongs_to() -> None:
    trajectory = replace(grasp(CUP, UP), goals=[Goal("in", "cup_1", "basket_1_contain_region")])
    assert "40.0 cm from the basket;" in diagnose(trajectory, success=False).reason


def test_what_held_and_no_longer_does() -> None:
    found = diagnose(two_goals(first_held=slice(60, 90), second_held=slice(100, None)), success=False)
    assert found.verdict == "undone"
    assert found.reason.startswith(
        "1 of 2 goals held at the end. The chest top was opened at step 60, but no longer from step 90 on"
    )


def test_twins_keep_their_numbers() -> None:
    trajectory = replace(grasp(JUG, {40: (0.3, 0.3, 0.2)}), objects=["cup_1", "cup_2", "plate_1"])
    assert "Lifted the cup 2 instead of the cup 1" in diagnose(trajectory, success=False).reason


def test_funnel_counts_what_has_the_stage() -> None:
    given: list[dict[str, Any]] = [
        {"stages": {"touched": 3, "grasped": None, "predicate_held": None}},
        {"stages": {"touched": 3, "grasped": 7, "predicate_held": 9}},
        {
            "stages": {
                "a: touched": 3,
                "b: touched": None,
                "a: moved": 4,
                "a: predicate_held": 5,
                "b: predicate_held": None,
            }
        },
        {"stages": {}},  # crashed
        {},  # written before there were stages
    ]
    rows = [row(0, 0, False, **facts) for facts in given]
    assert funnel(rows) == {
        "touched": {"episodes": 3, "reached": 2, "share": 2 / 3},
        "grasped": {"episodes": 2, "reached": 1, "share": 0.5},
        "moved": {"episodes": 1, "reached": 1, "share": 1.0},
        "predicate_held": {"episodes": 3, "reached": 1, "share": 1 / 3},
    }
    assert list(funnel(rows)) == ["touched", "grasped", "moved", "predicate_held"]
    assert funnel([]) == {}


def test_every_verdict_has_a_script_that_earns_it() -> None:
    rows = [line.split("|")[1] for line in (diagnosis.__doc__ or "").splitlines() if line.startswith("|")]
    codes = {code.strip() for row in rows for code in row.split(",") if re.fullmatch(r"[a-z_]+", code.strip())}
    assert codes - {"verdict", "error"} == {case.verdict for case in CASES}
