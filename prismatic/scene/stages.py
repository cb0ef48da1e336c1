"""What an episode's trajectory say was reached, goal by goal: {stage: first step}. Arrays in, no simulator.

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

from prismatic.scene.trajectory import OPENED, JointGoal, Trajectory, first

NEAR = 0.05  # m between the grip site and a box
MOVED = 0.1  # share of the way


def reached(trajectory: Trajectory, goal: int) -> dict[str, int | None]:
    """A goal's stages in order, each with the step at which it was first reached, or None."""
    stages = dict.fromkeys(trajectory.goals[goal].stage_names())
    stages["predicate_held"] = first(trajectory.held[:, goal])
    if trajectory.targets[goal] is not None:
        return _placing(trajectory, goal, stages)
    if trajectory.joint_goals[goal] is not None:
        return _moving(trajectory, goal, stages)
    return stages


def _placing(trajectory: Trajectory, goal: int, stages: dict[str, int | None]) -> dict[str, int | None]:
    thing, target, over = (
        trajectory.objects.index(trajectory.goals[goal].subject),
        trajectory.targets[goal],
        trajectory.over(goal),
    )
    assert target is not None
    if target.joint_goal is not None:
        stages = {OPENED: first(target.joint_goal.left(trajectory.values[:, target.joint_goal.part]) < 0), **stages}
    touched = np.any(trajectory.touch[:, thing], axis=1)
    stages["approached"] = first(np.logical_or(trajectory.gap(thing) < NEAR, touched))
    stages["touched"] = first(touched)
    grasps, lifts = trajectory.grasps(thing), trajectory.lifts(thing)
    stages["grasped"] = grasps[0][0] if grasps else None
    stages["lifted"] = lifts[0][0] if lifts else None
    carried = np.zeros_like(over)
    for start, stop in lifts:
        carried[start:stop] = over[start:stop]
    if target.owner is None:
        carried |= over & np.maximum.accumulate(touched)
    stages["carried"] = first(carried)
    let_go = [stop for _, stop in lifts if stop <= trajectory.steps and over[stop - 1]]
    stages["released"] = let_go[0] if let_go else None
    return stages


def _moving(trajectory: Trajectory, goal: int, stages: dict[str, int | None]) -> dict[str, int | None]:
    joint_goal = trajectory.joint_goals[goal]
    assert joint_goal is not None
    touched = np.any(trajectory.touch[:, len(trajectory.objects) + joint_goal.part], axis=1)
    stages["approached"] = first(np.logical_or(trajectory.part_gap[:, joint_goal.part] < NEAR, touched))
    stages["touched"] = first(touched)
    stages["moved"] = first(progress(joint_goal, trajectory.values[:, joint_goal.part]) >= MOVED)
    return stages


def progress(joint_goal: JointGoal, values: np.ndarray) -> np.ndarray:
    """(T + 1,) share of the way from the first value to the end; zeros where it was there from the start."""
    left = joint_goal.left(values)
    return 1 - left / left[0] if left[0] > 0 else np.zeros_like(left)


def named(trajectory: Trajectory) -> dict[str, int | None]:
    """All goals' stages in one dict; where there are several goals, a name begins with the goal's subject."""
    several = len(trajectory.goals) > 1
    return {
        f"{goal.subject}: {stage}" if several else stage: step
        for number, goal in enumerate(trajectory.goals)
        for stage, step in reached(trajectory, number).items()
    }
