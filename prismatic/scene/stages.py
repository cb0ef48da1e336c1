"""What an episode's trajectory says was reached, goal by goal: {stage: first step}. Arrays in, no simulator.

A goal is a predicate of the task's BDDL file. Its stages, in order, and what must hold:

| to put one thing on or in another (on, in) | |
|---|---|
| opened | the drawer or door of the target is open as LIBERO wants it (only where the target has one) |
| approached | the hand is within 5 cm of the object's box |
| touched | some part of the robot touches the object |
| grasped | both fingers touch it and have stopped at more than 3 mm, told to close, in two steps running |
| lifted | held, it is 2 cm higher than at its lowest in the half second before it was grasped (a hand may rise as it closes) |
| carried | held and lifted (to a zone of the table: pushed, too), it is over the target's outline |
| released | held no longer, and over the target's outline when let go |
| predicate_held | LIBERO's own predicate holds |

| to move a part (open, close, turnon, turnoff) | |
|---|---|
| approached | the hand is within 5 cm of the drawer, door or knob |
| touched | some part of the robot touches it |
| moved | it has gone a tenth of the way that is needed |
| predicate_held | LIBERO's own predicate holds |

A step is the number of actions before that moment: 0 is the state that the policy found. An episode ends as soon as all
predicates hold, often before the fingers open: a success may have no `released`, and a push no `grasped`.
"""

import numpy as np

from prismatic.scene.trajectory import OPENED, Goal, JointGoal, Trajectory, first

NEAR = 0.05  # m between the grip site and a box
MOVED = 0.1  # share of the way


def reached(trajectory: Trajectory, number: int) -> dict[str, int | None]:
    """A goal's stages in order, each with the step at which it was first reached, or None."""
    goal = trajectory.goals[number]
    found = {"predicate_held": first(trajectory.held[:, number])}
    if goal.place:
        found |= _placing(trajectory, number, goal, zone=goal.place.owner is None)
    elif goal.joint:
        part = goal.joint.part
        found |= _contact(trajectory.touch[:, len(trajectory.objects) + part], trajectory.part_gap[:, part])
        found["moved"] = first(progress(goal.joint, trajectory.values) >= MOVED)
    return dict.fromkeys(goal.stage_names()) | found


def _placing(trajectory: Trajectory, number: int, goal: Goal, *, zone: bool) -> dict[str, int | None]:
    thing, over = trajectory.objects.index(goal.subject), trajectory.over(number)
    touch, lifts = trajectory.touch[:, thing], trajectory.lifts(thing)
    carried = np.zeros_like(over)
    for start, stop in lifts:
        carried[start:stop] = over[start:stop]
    if zone:
        carried |= over & np.maximum.accumulate(touch.any(axis=1))
    found = _contact(touch, trajectory.gap(thing)) | {
        "grasped": next((start for start, _ in trajectory.grasps(thing)), None),
        "lifted": next((start for start, _ in lifts), None),
        "carried": first(carried),
        "released": next((stop for _, stop in lifts if stop <= trajectory.steps and over[stop - 1]), None),
    }
    if goal.joint:
        found[OPENED] = first(goal.joint.left(trajectory.values[:, goal.joint.part]) < 0)
    return found


def _contact(touch: np.ndarray, gap: np.ndarray) -> dict[str, int | None]:
    touched = np.asarray(touch.any(axis=1))
    return {"approached": first((gap < NEAR) | touched), "touched": first(touched)}


def progress(goal: JointGoal, values: np.ndarray) -> np.ndarray:
    """(T + 1,) share of the way that a part has gone from its first value to the end; zeros where it was there from the start. values: (T + 1, J)."""
    left = goal.left(values[:, goal.part])
    return 1 - left / left[0] if left[0] > 0 else np.zeros_like(left)


def named(trajectory: Trajectory) -> dict[str, int | None]:
    """All goals' stages in one dict; where there are several goals, a name begins with the goal's subject."""
    several = len(trajectory.goals) > 1
    return {
        f"{goal.subject}: {stage}" if several else stage: step
        for number, goal in enumerate(trajectory.goals)
        for stage, step in reached(trajectory, number).items()
    }
