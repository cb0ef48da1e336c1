"""Why an episode ended as it did: its trajectory in, a stable code and a sentence out.

It judges the goal that does not hold at the end; of several, the one that got furthest through its stages. docs/verdicts.md has the table of
verdicts and what must hold for each, in the order in which they are tried; the first that holds is given.
"""

import re
from dataclasses import dataclass

import numpy as np

from prismatic.scene.trajectory import MOVED, OPENED, JointGoal, Place, Trajectory, miss, runs

SHUT = 0.004  # m between the fingers, below which they have shut: on nothing, or on a bowl's rim (3.6 to 4.6 mm)
FALL = 0.05  # m
PUSHED = 0.05  # m
TIPPED = np.cos(np.radians(45))
BESIDE = 0.1  # m from the object, nearer than which an empty grasp is meant for it
IDLE_STEPS = 50
STILL, STILL_FINGERS = 0.01, 0.005  # m

SENTENCES = {"open": "opened", "close": "closed", "turnon": "turned on", "turnoff": "turned off"}
NOT_ENOUGH = {
    "open": "not_open_enough", "close": "not_closed_enough", "turnon": "not_turned_enough", "turnoff": "not_turned_enough",
}  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """What results.jsonl says of an episode: each stage's first step (None: never), a code, a sentence."""

    stages: dict[str, int | None]
    verdict: str
    reason: str


def diagnose(trajectory: Trajectory, *, success: bool) -> Diagnosis:
    """The diagnosis of an episode that ended without a crash."""
    stages, goals = trajectory.stages(), len(trajectory.goals)
    if success:
        return Diagnosis(stages, "success", f"Solved in {trajectory.steps} steps.")
    unmet = [goal for goal in range(goals) if not trajectory.held[-1, goal]]
    if not unmet:
        return Diagnosis(stages, "never_held", "Each predicate held at the end, but LIBERO did not end the episode.")
    case = max((_Case(trajectory, goal) for goal in unmet), key=lambda case: case.share)
    verdict, reason = case.verdict()
    if case.still >= IDLE_STEPS and verdict != "idle":
        reason += f"; the hand stood still for the last {case.still} steps"
    if goals > 1:
        reason = f"{goals - len(unmet)} of {goals} goals held at the end. {reason}"
    return Diagnosis(stages, verdict, f"{reason}.")


class _Case:
    """One goal that does not hold at the end. Each method but `verdict` knows some of the table's lines, and answers with code and sentence."""

    def __init__(self, trajectory: Trajectory, number: int) -> None:
        self.trajectory, self.number, self.goal = trajectory, number, trajectory.goals[number]
        self.stages = trajectory.reached(number)
        self.share = sum(step is not None for step in self.stages.values()) / len(self.stages)
        self.name, self.aim = (_plain(name or "") for name in (self.goal.subject, self.goal.target))
        self.offset = trajectory.offset[-1, number]
        self.distance = _cm(float(np.linalg.norm(self.offset[:2])))
        self.still = _still(trajectory)

    def verdict(self) -> tuple[str, str]:
        held = np.flatnonzero(self.trajectory.held[:, self.number])
        if held.size:
            wish = f"{self.goal.predicate} the {self.aim}" if self.goal.target else SENTENCES[self.goal.predicate]
            since = f"at step {held[0]}, but no longer from step {held[-1] + 1} on"
            return "undone", f"The {self.name} was {wish} {since}"
        if self.goal.place:
            return self._placing(self.goal.place)
        if self.goal.joint:
            return self._moving(self.goal.joint)
        return "never_held", f"The predicate ({self.goal.predicate} {self.name}) never held"

    # --- an object --------------------------------------------------------------------------------------------------

    def _placing(self, place: Place) -> tuple[str, str]:
        trajectory, thing = self.trajectory, self.trajectory.objects.index(self.goal.subject)
        lifts = trajectory.lifts(thing)
        if self.goal.joint and self.stages[OPENED] is None:  # in what is shut it cannot be
            tried = not lifts and (np.abs(self.goal.joint.progress(trajectory.values)) >= MOVED).any()
            if tried or self.stages["released"] is not None:
                part = trajectory.parts[self.goal.joint.part].name
                return "not_open_enough", self._how_far(self.goal.joint, "open", part)
        if lifts:
            return self._after_lift(place, thing, *lifts[-1])
        if other := self._other_lift():
            return "wrong_object", f"Lifted the {other} instead of the {self.name}"
        moved = float(np.linalg.norm(trajectory.places[-1, thing] - trajectory.places[0, thing]))
        tipped = bool(trajectory.upright[-1, thing] @ trajectory.upright[0, thing] < TIPPED)
        if place.owner is None and moved >= PUSHED:
            return "beside_target", f"Pushed the {self.name}; {self._where(place)}"
        if self.stages["grasped"] is not None:
            text = f"Grasped the {self.name} at step {self.stages['grasped']}, but never lifted it by 2 cm"
            dragged = f"; it ended {_cm(moved)} from where it stood" if moved >= PUSHED else ""
            return "not_lifted", text + dragged
        empty = self._empty_grasps(thing)
        if self.stages["touched"] is not None and (moved >= PUSHED or tipped):
            text = f"Pushed the {self.name} {_cm(moved)} away without grasping it"
            return "pushed_away", text + ", and tipped it over" * tipped + (empty and f"; {empty}")
        if empty:
            return "closed_beside", empty[0].upper() + empty[1:]
        return self._nothing(trajectory.gap(thing), "never_grasped")

    def _after_lift(self, place: Place, thing: int, start: int, stop: int) -> tuple[str, str]:
        trajectory, over = self.trajectory, self.trajectory.over(self.number)
        if stop > trajectory.steps:
            if not over[-1]:
                return "not_carried", f"Still held the {self.name} at the end, {self.distance} from the {self.aim}"
            since = max([begin for begin, _ in runs(over)][-1], start)
            held = f"Held the {self.name} over the {self.aim} from step {since} on"
            return "never_released", f"{held} and never let go of it"
        fall = trajectory.places[stop - 1, thing, 2] - trajectory.places[-1, thing, 2]
        if not over[stop - 1] and fall > FALL:
            how = "it slipped out of the closed gripper" if trajectory.closing[stop] else "the gripper opened"
            away = _cm(float(np.linalg.norm(trajectory.offset[stop - 1, self.number, :2])))
            dropped = f"Dropped the {self.name} at step {stop}, {away} from the {self.aim}"
            return "dropped", f"{dropped}: {how}; it fell {_cm(fall)}"
        text = f"Let go of the {self.name} at step {stop}"
        if wrong := [name for name in trajectory.supports[self.number] if name != place.owner]:
            return "wrong_target", f"{text}; it rests on the {_plain(wrong[0])}, not on the {self.aim}"
        return "beside_target" if self._miss(place) > 0 else "never_held", f"{text}; {self._where(place)}"

    def _miss(self, place: Place) -> float:
        """m beyond what the predicate allows horizontally, at the end."""
        if self.goal.target in self.trajectory.objects:  # a disc around the other object's origin
            return max(float(np.linalg.norm(self.offset[:2]) - place.room[0]), 0.0)
        return float(miss(self.offset, place.room))

    def _where(self, place: Place) -> str:
        beyond = self._miss(place)
        if beyond > 0:
            ended = f"it ended {self.distance} from the middle of the {self.aim}"
            text = f"{ended}, {_cm(beyond)} more than LIBERO allows"
            return text + (", and was never grasped" if self.stages["grasped"] is None else "")
        height = f"{_cm(abs(self.offset[2]))} {'above' if self.offset[2] >= 0 else 'below'} its middle"
        return f"it ended at the {self.aim}, {height}, but the predicate never held"

    def _other_lift(self) -> str | None:
        """An object that was lifted though it is no goal's."""
        subjects = {goal.subject for goal in self.trajectory.goals}
        for other, name in enumerate(self.trajectory.objects):
            if name not in subjects and self.trajectory.lifts(other):
                return _plain(name)
        return None

    def _empty_grasps(self, thing: int) -> str:
        """How often, and how near, the fingers shut on nothing beside the object; empty where they did not."""
        gap = self.trajectory.gap(thing)
        between = np.any(np.all(self.trajectory.touch[:, : len(self.trajectory.objects), :2], axis=2), axis=1)
        shut = (self.trajectory.opening < SHUT) & self.trajectory.closing & ~between
        near = [start for start, _ in runs(shut) if gap[start] < BESIDE]
        if not near:
            return ""
        times = "once" if len(near) == 1 else f"{len(near)} times"
        best = min(near, key=lambda step: gap[step])
        return f"closed the gripper on nothing {times}, {_cm(gap[best])} from the {self.name} at step {best}"

    # --- a part -----------------------------------------------------------------------------------------------------

    def _moving(self, goal: JointGoal) -> tuple[str, str]:
        trajectory = self.trajectory
        if self.stages["moved"] is not None:
            return NOT_ENOUGH[self.goal.predicate], self._how_far(goal, self.goal.predicate, self.goal.subject)
        asked = {other.joint.part for other in trajectory.goals if other.joint and not other.place}
        for number, part in enumerate(trajectory.parts):
            travel = np.abs(trajectory.values[:, number] - trajectory.values[0, number]).max()
            if number not in asked and travel >= MOVED * part.span:
                way = _amount(travel, part.hinge)
                return "wrong_part", f"Moved the {_plain(part.name)} by {way}, not the {self.name}"
        if self.stages["touched"] is not None:
            best = f"moved it only {100 * goal.progress(trajectory.values).max():.0f} % of the way"
            return "not_moved", f"Touched the {self.name} at step {self.stages['touched']}, but {best}"
        if other := self._other_lift():
            return "wrong_object", f"Lifted the {other} and never touched the {self.name}"
        return self._nothing(trajectory.part_gap[:, goal.part], "never_touched")

    def _how_far(self, goal: JointGoal, predicate: str, name: str) -> str:
        hinge, left = self.trajectory.parts[goal.part].hinge, goal.left(self.trajectory.values[:, goal.part])
        ways = (left[0] - left.min(), left[0], max(left[0] - left[-1], 0))
        best, needed, last = (_amount(way, hinge) for way in ways)
        text = f"The {_plain(name)} was to be {SENTENCES[predicate]}, by {needed}; it got {best} far"
        return text + (f" and ended at {last}" if left[-1] > left.min() + MOVED * left[0] else "")

    # --- either -----------------------------------------------------------------------------------------------------

    def _nothing(self, gap: np.ndarray, near: str) -> tuple[str, str]:
        """Nothing was done to the goal's thing. gap (T + 1,): how far the hand was from it."""
        if self.still >= IDLE_STEPS:
            state = "shut" if self.trajectory.opening[-1] < SHUT else "open"
            text = f"Stood still for the last {self.still} of {self.trajectory.steps} steps, {_cm(gap[-1])} from the {self.name}"
            return "idle", f"{text}, the gripper {state}"
        closest = f"at best {_cm(gap.min())} from the {self.name} at step {int(gap.argmin())}"
        if self.stages.get("approached") is None:
            return "never_near", f"Never came near: {closest}"
        text = f"Came near ({closest}), but never {near.removeprefix('never_')} it"
        touched = self.stages["touched"]
        return near, text + ("" if touched is None else f", only touched it at step {touched}")


def _still(trajectory: Trajectory) -> int:
    """For how many steps at the end the hand stood still."""
    away = np.linalg.norm(trajectory.hand - trajectory.hand[-1], axis=1) > STILL
    away |= np.abs(trajectory.opening - trajectory.opening[-1]) > STILL_FINGERS
    return trajectory.steps - (int(np.flatnonzero(away)[-1]) + 1 if away.any() else 0)


def _plain(name: str) -> str:
    """A name of the BDDL file for people: the first of its kind without its number."""
    name = re.sub(r"^(.*?)_1(?=_|$)", r"\1", name)
    return re.sub(r"(_contain|_heating|_cook)?_region$", "", name).replace("_", " ")


def _cm(metres: float) -> str:
    return f"{100 * metres:.1f} cm"


def _amount(value: float, hinge: bool) -> str:
    return f"{np.degrees(value):.0f} degrees" if hinge else _cm(value)
