"""What an episode's states say of its objects, as arrays over time, and which stages of its goals they reach. No simulator here.

scene/recorder.py fills a Trajectory; diagnosis.py says why it ended so. A goal is a predicate of the task's BDDL file; docs/verdicts.md has
the table of its stages, and what a step is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

PLACING = ("on", "in")
MOVING = ("open", "close", "turnon", "turnoff")
OPENED = "opened"
PLACE_STAGES = ("approached", "touched", "grasped", "lifted", "carried", "released", "predicate_held")
MOVE_STAGES = ("approached", "touched", "moved", "predicate_held")
STAGES = (OPENED, *PLACE_STAGES[:-1], "moved", "predicate_held")  # all of them, in order
LIFTED = 0.02  # m
OVER = 0.01  # m beyond the target's outline that still count as over it
EMPTY = 0.003  # m between the fingers, at which nothing can be between them
STOPPED = 0.002  # m a step: fingers that close on nothing move faster
GRASP_STEPS = 2  # running, that make a grasp
FLICKER = 2  # steps without contact that don't end one
NEAR = 0.05  # m between the grip site and a box
MOVED = 0.1  # share of the way
CLOSING_STEPS = 10  # before a grasp, in which the hand may lift what its fingers are still closing on


@dataclass(frozen=True)
class Part:
    """A drawer, door or knob: the joint's name, its fixture, and the length of its whole way (m or rad)."""

    name: str
    fixture: str
    hinge: bool
    span: float


@dataclass(frozen=True)
class JointGoal:
    """Where a part's value must get: past `end`, in the direction `sign`."""

    part: int  # index into Trajectory.parts
    end: float
    sign: float

    def left(self, values: np.ndarray) -> np.ndarray:
        """How far it still is; negative when it is there."""
        return (self.end - values) * self.sign

    def progress(self, values: np.ndarray) -> np.ndarray:
        """(T + 1,) share of the way that the part has gone from its first value to the end; zeros where it was there from the start.

        values: (T + 1, J).
        """
        left = self.left(values[:, self.part])
        return 1 - left / left[0] if left[0] > 0 else np.zeros_like(left)


@dataclass(frozen=True)
class Place:
    """Where an object goes. `outline` and `room` are half sizes (3,), m: of the whole target, and of where the
    object's origin must be horizontally for LIBERO's predicate (its height has other rules).
    """

    owner: str | None  # the thing that it is or belongs to; None: a zone of the table
    outline: np.ndarray
    room: np.ndarray


@dataclass(frozen=True)
class Goal:
    """A predicate as the BDDL file has it, in lower case, and what it means in this scene."""

    predicate: str
    subject: str
    target: str | None = None
    place: Place | None = None  # where it puts an object
    joint: JointGoal | None = None  # of the part that it moves, or that must be open for what it puts

    def stage_names(self) -> tuple[str, ...]:
        """Its stages in order."""
        if self.predicate in PLACING:
            return (OPENED, *PLACE_STAGES) if self.joint else PLACE_STAGES
        return MOVE_STAGES if self.predicate in MOVING else ("predicate_held",)


@dataclass
class Trajectory:
    """An episode as the simulator's state told it; T + 1 moments, the first before any action. m, rad, world axes."""

    goals: Sequence[Goal]  # G
    objects: Sequence[str]  # N movable ones
    parts: Sequence[Part]  # J
    centre: np.ndarray  # (N, 3) of an object's box, from the object's origin, at the start
    half: np.ndarray  # (N, 3) half sizes of that box
    hand: np.ndarray  # (T + 1, 3) grip site
    opening: np.ndarray  # (T + 1,) between the fingers
    closing: np.ndarray  # (T + 1,) bool: the gripper has been told to close
    places: np.ndarray  # (T + 1, N, 3) origins
    upright: np.ndarray  # (T + 1, N, 3) the world's up in the object's own axes
    touch: np.ndarray  # (T + 1, N + J, 3) bool: by the left finger, the right finger, the rest of the robot
    offset: np.ndarray  # (T + 1, G, 3) object - target; zeros where the goal places nothing
    values: np.ndarray  # (T + 1, J) of the joints
    part_gap: np.ndarray  # (T + 1, J) between the grip site and the part; inf where no goal asks
    held: np.ndarray  # (T + 1, G) bool: LIBERO's predicates
    supports: Sequence[Sequence[str]] = field(default_factory=list)  # a goal: what its object rests on at the end

    @property
    def steps(self) -> int:
        """T, the number of actions."""
        return len(self.hand) - 1

    def gap(self, thing: int) -> np.ndarray:
        """(T + 1,) distance of the grip site from an object's box, which is taken as square, since it may turn."""
        half = np.array([self.half[thing, :2].max(), self.half[thing, :2].max(), self.half[thing, 2]])
        beyond = np.abs(self.hand - self.places[:, thing] - self.centre[thing]) - half
        return np.linalg.norm(np.maximum(beyond, 0), axis=1)

    def grasps(self, thing: int) -> list[tuple[int, int]]:
        """[start, stop) of the moments at which an object was held."""
        stopped = np.abs(np.diff(self.opening, prepend=self.opening[0])) < STOPPED
        both = self.touch[:, thing, 0] & self.touch[:, thing, 1] & self.closing & stopped & (self.opening > EMPTY)
        spans: list[tuple[int, int]] = []
        for start, stop in runs(both):
            if spans and start - spans[-1][1] <= FLICKER:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
        return [(start, stop) for start, stop in spans if stop - start >= GRASP_STEPS]

    def lifts(self, thing: int) -> list[tuple[int, int]]:
        """[start, stop) from the moment at which a held object is lifted to that at which it is let go."""
        lifts = []
        for start, stop in self.grasps(thing):
            rest = self.places[max(start - CLOSING_STEPS, 0) : start + 1, thing, 2].min()
            height = self.places[start:stop, thing, 2] - rest
            if height.max() >= LIFTED:
                lifts.append((start + int(np.argmax(height >= LIFTED)), stop))
        return lifts

    def over(self, goal: int) -> np.ndarray:
        """(T + 1,) bool: the object is over its target's outline."""
        place = self.goals[goal].place
        assert place is not None
        return miss(self.offset[:, goal], place.outline) <= OVER

    def reached(self, number: int) -> dict[str, int | None]:
        """A goal's stages in order, each with the step at which it was first reached, or None."""
        goal = self.goals[number]
        found = {"predicate_held": first(self.held[:, number])}
        if goal.place:
            found |= self._placing(number, goal, zone=goal.place.owner is None)
        elif goal.joint:
            part = goal.joint.part
            found |= _contact(self.touch[:, len(self.objects) + part], self.part_gap[:, part])
            found["moved"] = first(goal.joint.progress(self.values) >= MOVED)
        return dict.fromkeys(goal.stage_names()) | found

    def _placing(self, number: int, goal: Goal, *, zone: bool) -> dict[str, int | None]:
        thing, over = self.objects.index(goal.subject), self.over(number)
        touch, lifts = self.touch[:, thing], self.lifts(thing)
        carried = np.zeros_like(over)
        for start, stop in lifts:
            carried[start:stop] = over[start:stop]
        if zone:
            carried |= over & np.maximum.accumulate(touch.any(axis=1))
        found = _contact(touch, self.gap(thing)) | {
            "grasped": next((start for start, _ in self.grasps(thing)), None),
            "lifted": next((start for start, _ in lifts), None),
            "carried": first(carried),
            "released": next((stop for _, stop in lifts if stop <= self.steps and over[stop - 1]), None),
        }
        if goal.joint:
            found[OPENED] = first(goal.joint.left(self.values[:, goal.joint.part]) < 0)
        return found

    def stages(self) -> dict[str, int | None]:
        """All goals' stages in one dict; where there are several goals, a name begins with the goal's subject."""
        several = len(self.goals) > 1
        return {
            f"{goal.subject}: {stage}" if several else stage: step
            for number, goal in enumerate(self.goals)
            for stage, step in self.reached(number).items()
        }


def miss(offset: np.ndarray, half: np.ndarray) -> np.ndarray:
    """(...,) horizontal distance beyond a rectangle of half sizes (3,), of points (..., 3) from its middle."""
    return np.linalg.norm(np.maximum(np.abs(offset[..., :2]) - half[:2], 0), axis=-1)


def runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """[start, stop) of each stretch of True in (T,) bool."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    yield from ((int(start), int(stop)) for start, stop in edges.reshape(-1, 2))


def first(mask: np.ndarray) -> int | None:
    """Index of the first True."""
    return int(np.argmax(mask)) if mask.any() else None


def _contact(touch: np.ndarray, gap: np.ndarray) -> dict[str, int | None]:
    touched = np.asarray(touch.any(axis=1))
    return {"approached": first((gap < NEAR) | touched), "touched": first(touched)}
