"""Why an episode ended as it did: its trajectory in, a stable code and a sentence out.

It judges the goal that does not hold at the end; of several, the one that got furthest through its stages. The first line
that holds is the verdict.

| verdict | what must hold |
|---|---|
| success | LIBERO's `done`: all predicates at once |
| error | the simulator or the policy crashed: that says nothing about the policy |
| undone | the predicate held before, and no longer does at the end (the episode went on for another goal) |
| **an object that goes on or in something** | |
| not_open_enough | the target's drawer or door never was open, and the object was let go at it, or never lifted though the drawer was moved |
| never_released | held and lifted at the end, over the target's outline |
| not_carried | held and lifted at the end, elsewhere |
| dropped | lifted and let go, and it fell more than 5 cm, not over the target's outline |
| wrong_target | lifted and let go, and it rests on an object or fixture that is not the target |
| beside_target | lifted and let go (to a zone of the table: or only pushed, by 5 cm), and it ends farther from the target than the predicate allows |
| never_held | it was let go, and lies at the target, but the predicate never held: wrong height, or no contact |
| wrong_object | it was never lifted, but another thing was, which is no goal's object |
| not_lifted | grasped, never lifted by 2 cm |
| pushed_away | never grasped, but touched, and moved by 5 cm or tipped over by 45 degrees |
| closed_beside | never grasped; the gripper shut on nothing within 10 cm of it |
| **a drawer, door or knob** | |
| not_open_enough, not_closed_enough, not_turned_enough | moved by a tenth of the way that is needed, not all of it |
| wrong_part | not moved, but another drawer, door or knob was, which no goal names, by a tenth of its way |
| wrong_object | not touched, but a thing was lifted that is no goal's object |
| not_moved | touched, moved by less than a tenth of the way |
| **either** | |
| idle | none of these, and the hand stood still for the last 50 steps or more (within 1 cm, the fingers within 5 mm) |
| never_grasped | an object: approached, never grasped |
| never_touched | a part: approached, never touched |
| never_near | the hand never came within 5 cm of it |

"Carried" and "lifted" are stages.py's. `done` ends an episode: "placed, but it did not stop" can only mean that the
predicate never held (beside_target, never_held, wrong_target say by what).
"""

import re
from dataclasses import dataclass, field

import numpy as np

from prismatic.scene.stages import MOVED, named, progress, reached
from prismatic.scene.trajectory import OPENED, JointGoal, Target, Trajectory, miss, runs

SHUT = 0.004  # m between the fingers, below which they have shut: on nothing, or on a bowl's rim (3.6 to 4.6 mm)
FALL = 0.05  # m
PUSHED = 0.05  # m
TIPPED = np.cos(np.radians(45))
BESIDE = 0.1  # m from the object, nearer than which an empty grasp is meant for it
IDLE_STEPS = 50
STILL, STILL_FINGERS = 0.01, 0.005  # m

SENTENCES = {"open": "opened", "close": "closed", "turnon": "turned on", "turnoff": "turned off"}
NOT_ENOUGH = {
    "open": "not_open_enough",
    "close": "not_closed_enough",
    "turnon": "not_turned_enough",
    "turnoff": "not_turned_enough",
}


@dataclass(frozen=True)
class Diagnosis:
    """What results.jsonl says of an episode: each stage's first step (None: never), a code, a sentence."""

    stages: dict[str, int | None] = field(default_factory=dict)
    verdict: str = "error"
    reason: str = ""


def diagnose(trajectory: Trajectory, *, success: bool) -> Diagnosis:
    """The diagnosis of an episode that ended without a crash."""
    stages = named(trajectory)
    if success:
        return Diagnosis(stages, "success", f"Solved in {trajectory.steps} steps.")
    verdict, sentence = judge(trajectory)
    return Diagnosis(stages, verdict, sentence)


def judge(trajectory: Trajectory) -> tuple[str, str]:
    """(code, sentence) of an episode without success."""
    unmet = [goal for goal in range(len(trajectory.goals)) if not trajectory.held[-1, goal]]
    if not unmet:
        return "never_held", "Each predicate held at the end, but LIBERO did not end the episode."
    case = max((_Case(trajectory, goal) for goal in unmet), key=lambda case: case.share)
    verdict, sentence = case.verdict()
    if len(trajectory.goals) > 1:
        met = len(trajectory.goals) - len(unmet)
        sentence = f"{met} of {len(trajectory.goals)} goals held at the end. {sentence}"
    return verdict, sentence


class _Case:
    """One goal that does not hold at the end."""

    def __init__(self, trajectory: Trajectory, goal: int) -> None:
        self.trajectory, self.number, self.goal = trajectory, goal, trajectory.goals[goal]
        self.stages = reached(trajectory, goal)
        self.share = sum(step is not None for step in self.stages.values()) / len(self.stages)
        self.name = _plain(self.goal.subject, trajectory)
        self.still = _still(trajectory)

    def verdict(self) -> tuple[str, str]:
        target, joint_goal = self.trajectory.targets[self.number], self.trajectory.joint_goals[self.number]
        held = np.flatnonzero(self.trajectory.held[:, self.number])
        if held.size:
            return "undone", self._sentence(
                f"{self._wish()} at step {held[0]}, but no longer from step {held[-1] + 1} on"
            )
        if target is not None:
            return self._placing(target)
        if joint_goal is not None:
            return self._moving(joint_goal)
        return "never_held", f"The predicate ({' '.join(self.goal.state)}) never held."

    def _wish(self) -> str:
        if self.goal.target:
            return f"The {self.name} was {self.goal.predicate} the {_plain(self.goal.target, self.trajectory)}"
        return f"The {self.name} was {SENTENCES[self.goal.predicate]}"

    def _sentence(self, text: str, *, tail: bool = True) -> str:
        """With what the hand did at the end, where it stood still for long."""
        if tail and self.still >= IDLE_STEPS:
            text += f"; the hand stood still for the last {self.still} steps"
        return text + "."

    # --- an object --------------------------------------------------------------------------------------------------

    def _placing(self, target: Target) -> tuple[str, str]:
        trajectory, thing = self.trajectory, self.trajectory.objects.index(self.goal.subject)
        lifts = trajectory.lifts(thing)
        if shut := self._not_open(target, lifted=bool(lifts)):
            return "not_open_enough", self._sentence(shut)
        if lifts:
            return self._after_lift(target, thing, *lifts[-1])
        if other := self._other_lift():
            return "wrong_object", self._sentence(f"Lifted the {other} instead of the {self.name}")
        if target.owner is None and self._moved(thing) >= PUSHED:
            return "beside_target", self._sentence(f"Pushed the {self.name}; {self._where(target)}")
        if self.stages["grasped"] is not None:
            text = f"Grasped the {self.name} at step {self.stages['grasped']}, but never lifted it by 2 cm"
            if self._moved(thing) >= PUSHED:
                text += f"; it ended {_cm(self._moved(thing))} from where it stood"
            return "not_lifted", self._sentence(text)
        empty = self._empty_grasps(thing)
        if self.stages["touched"] is not None and (pushed := self._pushed(thing)):
            return "pushed_away", self._sentence(pushed + ("" if empty is None else "; " + empty))
        if empty is not None:
            return "closed_beside", self._sentence(empty[0].upper() + empty[1:])
        return self._nothing(trajectory.gap(thing), "never_grasped")

    def _not_open(self, target: Target, *, lifted: bool) -> str | None:
        """What is wrong with the target's drawer or door, where that is why the object cannot be in it."""
        joint_goal = target.joint_goal
        if joint_goal is None or self.stages[OPENED] is not None:
            return None
        at_it = self.stages["released"] is not None
        tried = not lifted and bool(
            (np.abs(progress(joint_goal, self.trajectory.values[:, joint_goal.part])) >= MOVED).any()
        )
        return (
            self._how_far(joint_goal, "open", self.trajectory.parts[joint_goal.part].name) if at_it or tried else None
        )

    def _after_lift(self, target: Target, thing: int, start: int, stop: int) -> tuple[str, str]:
        trajectory, over = self.trajectory, self.trajectory.over(self.number)
        aim = _plain(self.goal.target or "", trajectory)
        if stop > trajectory.steps:
            if over[-1]:
                since = [begin for begin, _ in runs(over)][-1]
                text = f"Held the {self.name} over the {aim} from step {max(since, start)} on and never let go of it"
                return "never_released", self._sentence(text)
            return "not_carried", self._sentence(
                f"Still held the {self.name} at the end, {self._distance()} from the {aim}"
            )
        fall = trajectory.places[stop - 1, thing, 2] - trajectory.places[-1, thing, 2]
        slipped = bool(trajectory.closing[stop])
        if not over[stop - 1] and fall > FALL:
            how = "it slipped out of the closed gripper" if slipped else "the gripper opened"
            away = float(np.linalg.norm(trajectory.offset[stop - 1, self.number, :2]))
            text = f"Dropped the {self.name} at step {stop}, {_cm(away)} from the {aim}: {how}"
            return "dropped", self._sentence(f"{text}; it fell {_cm(fall)}")
        wrong = [name for name in trajectory.supports[self.number] if name != target.owner]
        if wrong:
            other = _plain(wrong[0], trajectory)
            text = f"Let go of the {self.name} at step {stop}; it rests on the {other}, not on the {aim}"
            return "wrong_target", self._sentence(text)
        text = f"Let go of the {self.name} at step {stop}; {self._where(target)}"
        return ("beside_target" if self._miss(target) > 0 else "never_held"), self._sentence(text)

    def _miss(self, target: Target) -> float:
        """m beyond what the predicate allows horizontally, at the end."""
        offset = self.trajectory.offset[-1, self.number]
        if self.goal.target in self.trajectory.objects:  # a disc around the other object's origin
            return max(float(np.linalg.norm(offset[:2]) - target.room[0]), 0.0)
        return float(miss(offset, target.room))

    def _where(self, target: Target) -> str:
        offset, aim = self.trajectory.offset[-1, self.number], _plain(self.goal.target or "", self.trajectory)
        beyond = self._miss(target)
        if beyond > 0:
            text = f"it ended {self._distance()} from the middle of the {aim}, {_cm(beyond)} more than LIBERO allows"
            return text + (", and was never grasped" if self.stages["grasped"] is None else "")
        side = "above" if offset[2] >= 0 else "below"
        return f"it ended at the {aim}, {_cm(abs(offset[2]))} {side} its middle, but the predicate never held"

    def _distance(self) -> str:
        return _cm(float(np.linalg.norm(self.trajectory.offset[-1, self.number, :2])))

    def _other_lift(self) -> str | None:
        """An object that was lifted though it is no goal's."""
        subjects = {goal.subject for goal in self.trajectory.goals}
        for other, name in enumerate(self.trajectory.objects):
            if name not in subjects and self.trajectory.lifts(other):
                return _plain(name, self.trajectory)
        return None

    def _moved(self, thing: int) -> float:
        return float(np.linalg.norm(self.trajectory.places[-1, thing] - self.trajectory.places[0, thing]))

    def _pushed(self, thing: int) -> str | None:
        upright = self.trajectory.upright[:, thing]
        tipped = float(upright[-1] @ upright[0]) < TIPPED
        if self._moved(thing) < PUSHED and not tipped:
            return None
        text = f"Pushed the {self.name} {_cm(self._moved(thing))} away without grasping it"
        return text + (", and tipped it over" if tipped else "")

    def _empty_grasps(self, thing: int) -> str | None:
        """How often, and how near, the fingers shut on nothing beside the object."""
        gap = self.trajectory.gap(thing)
        between = np.any(np.all(self.trajectory.touch[:, : len(self.trajectory.objects), :2], axis=2), axis=1)
        shut = (self.trajectory.opening < SHUT) & self.trajectory.closing & ~between
        near = [start for start, _ in runs(shut) if gap[start] < BESIDE]
        if not near:
            return None
        times = "once" if len(near) == 1 else f"{len(near)} times"
        best = min(near, key=lambda step: gap[step])
        return f"closed the gripper on nothing {times}, {_cm(gap[best])} from the {self.name} at step {best}"

    # --- a part -----------------------------------------------------------------------------------------------------

    def _moving(self, joint_goal: JointGoal) -> tuple[str, str]:
        trajectory = self.trajectory
        if self.stages["moved"] is not None:
            return NOT_ENOUGH[self.goal.predicate], self._sentence(
                self._how_far(joint_goal, self.goal.predicate, self.goal.subject)
            )
        asked = {other.part for other in trajectory.joint_goals if other}
        for number, part in enumerate(trajectory.parts):
            travel = np.abs(trajectory.values[:, number] - trajectory.values[0, number]).max()
            if number not in asked and travel >= MOVED * part.span:
                text = (
                    f"Moved the {_plain(part.name, trajectory)} by {_amount(travel, part.hinge)}, not the {self.name}"
                )
                return "wrong_part", self._sentence(text)
        if self.stages["touched"] is not None:
            best = progress(joint_goal, trajectory.values[:, joint_goal.part]).max()
            text = f"Touched the {self.name} at step {self.stages['touched']}, but moved it only {100 * best:.0f} % of the way"
            return "not_moved", self._sentence(text)
        if other := self._other_lift():
            return "wrong_object", self._sentence(f"Lifted the {other} and never touched the {self.name}")
        return self._nothing(trajectory.part_gap[:, joint_goal.part], "never_touched")

    def _how_far(self, joint_goal: JointGoal, predicate: str, name: str) -> str:
        part, values = self.trajectory.parts[joint_goal.part], self.trajectory.values[:, joint_goal.part]
        left = joint_goal.left(values)
        best, needed = left[0] - left.min(), left[0]
        text = (
            f"The {_plain(name, self.trajectory)} was to be {SENTENCES[predicate]}, by {_amount(needed, part.hinge)}; "
        )
        text += f"it got {_amount(best, part.hinge)} far"
        if left[-1] > left.min() + MOVED * needed:
            text += f" and ended at {_amount(max(left[0] - left[-1], 0), part.hinge)}"
        return text

    # --- either -----------------------------------------------------------------------------------------------------

    def _nothing(self, gap: np.ndarray, near: str) -> tuple[str, str]:
        """Nothing was done to the goal's thing. gap (T + 1,): how far the hand was from it."""
        if self.still >= IDLE_STEPS:
            state = "shut" if self.trajectory.opening[-1] < SHUT else "open"
            text = f"Stood still for the last {self.still} of {self.trajectory.steps} steps, {_cm(gap[-1])} from the {self.name}"
            return "idle", self._sentence(f"{text}, the gripper {state}", tail=False)
        closest = f"{_cm(gap.min())} from the {self.name} at step {int(gap.argmin())}"
        if self.stages.get("approached") is None:
            return "never_near", self._sentence(f"Never came near: at best {closest}")
        what = "grasped" if near == "never_grasped" else "touched"
        text = f"Came near (at best {closest}), but never {what} it"
        if self.stages.get("touched") is not None:
            text += f", only touched it at step {self.stages['touched']}"
        return near, self._sentence(text)


def _still(trajectory: Trajectory) -> int:
    """For how many steps at the end the hand stood still."""
    away = np.linalg.norm(trajectory.hand - trajectory.hand[-1], axis=1) > STILL
    away |= np.abs(trajectory.opening - trajectory.opening[-1]) > STILL_FINGERS
    return trajectory.steps - (int(np.flatnonzero(away)[-1]) + 1 if away.any() else 0)


def _plain(name: str, trajectory: Trajectory) -> str:
    """A name of the BDDL file for people: without the number where there is only one of its kind."""
    names = {
        *trajectory.objects,
        *(part.fixture for part in trajectory.parts),
        *(goal.target for goal in trajectory.goals),
    }

    def bare(match: re.Match[str]) -> str:
        twins = [f"{match[1]}_{number}" for number in range(1, 10)]
        return match[1] if sum(twin in names for twin in twins) < 2 else match[0]

    name = re.sub(r"^(.*?)_1(?=_|$)", bare, name)
    return re.sub(r"(_contain|_heating|_cook)?_region$", "", name).replace("_", " ")


def _cm(metres: float) -> str:
    return f"{100 * metres:.1f} cm"


def _amount(value: float, hinge: bool) -> str:
    return f"{np.degrees(value):.0f} degrees" if hinge else _cm(value)
