"""A scripted pick-and-place policy that reads the simulator's state: what a demonstration is made of.

Its answer depends on the present state alone (no memory), so it can also label states
that it would never reach itself. Made to be imitated from images by arg-max: the same image always gets the same
answer (velocities, which no image shows, play no part), commands are multiples of `rounding`, and nothing waits: the
fingers close while the hand still sinks the last centimetres, and the lift starts at the first touch of both pads.
Fingers that shut on nothing open at once: where they rise before, a policy learns to open also those that carry (docs/evaluate.md).
What it puts on something it presses down and never lets go: LIBERO counts the first touch, and a release is one or two frames, too few to learn.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from prismatic.errors import ConfigError
from prismatic.rollout import Simulator
from prismatic.scene.recorder import ON_RADIUS
from prismatic.scene.shapes import Shapes
from prismatic.simulator import LiberoSimulator

GAIN = 32.0  # command per metre of error: full speed (about 13 mm a step) from 3 cm on
TURN_GAIN = 2.5  # command per radian of error
FAR = 0.7  # m before the robot's base, from where on the arm is so stretched that the hand leans more and more
STRAIGHT = -0.1  # rad, joint 4 (its stop: -0.07) from where on the hand gets no nearer to the robot unless it leans
LEAN_SPEED = 0.5  # command at which it leans towards the robot then, and back
LEANING = 0.2  # rad, from where on a hand that carries something is put upright again, before it arrives
ARRIVING = 0.15  # m from the target, where that begins
OPEN, CLOSE = 1.0, 0.0

RIM_INSET = 0.003  # m, aim this far inside a bowl's outer radius
RIM_DEPTH = 0.024  # m, pads' centre below the rim when the fingers are shut
BOX_DEPTH = 0.028  # m, the same for the top of a box, can or bottle
RIM_CLOSING = 0.036  # m above the grasp at which the fingers start to close: they need ten steps to a bowl's rim
BOX_CLOSING = 0.018  # m, the same for a box, which they reach sooner and must not close above
CLOSING_SPEED = -0.25  # command at which the hand sinks while the fingers close
STRETCHED_SPEED = -0.5  # the same where the arm is stretched and follows only half
STEADY = 0.008  # m, lateral error that is left alone while the fingers close
RIM_STOP = 0.004  # m below the grasp point, where it sinks no further
BOX_STOP = -0.003  # m, the same for a box: fingers pressed on the table rub and don't close
FINGERTIP = 0.014  # m, lowest pads' centre above what a box stands on
ALIGNED = 0.015  # m, lateral error that lets the hand sink and the fingers close
MISSED = 0.004  # m, a finger opening at which nothing can be between the pads
SHUT = 0.012  # m, a finger opening at which a rim that one pad touches may be held
HIGH = 0.2  # m above the table from where on the stretched arm hardly reaches the far half of an object
OUT_OF_REACH = 0.75  # m before the robot's base, from where on the same holds
FINGER_REACH = 0.045  # m, how far outside the rim an open finger comes down
FINGER_DEPTH = 0.02  # m below the rim that it reaches
FINGER_RADIUS = 0.03  # m, room that it needs around it
HAND = (0.1, 0.035, 0.03)  # m, half sizes of the hand along and across the fingers, and its lowest above the rim
HOVER = 0.1  # m above the grasp, while the hand is still far away
PASSING = 0.06  # m from the carried object's path, nearer than which it passes over something
CLEARANCE = 0.03  # m between the carried object and what it passes over
SETTING_DOWN = -0.5  # command at which an object is lowered onto what it shall stand on
DROP_RADIUS = 0.015  # m, lateral error at which the fingers open
DROP_HEIGHT = 0.014  # m above where it shall be, from where on they do
PLACES = ("contain_region", "cook_region", "top_side")  # regions that are open to above; drawers and racks aren't
VOTERS = 10  # stored initial states that decide on which side a bowl is grasped
NEARLY_ALL = 0.95  # of them must agree, so that a fixture's jitter doesn't turn the decision
DIAGONAL = float(np.sqrt(0.5))
SIDES = [(0.0, -1.0), (0.0, 1.0), (1.0, 0.0), (-1.0, 0.0), (-DIAGONAL, DIAGONAL), (-DIAGONAL, -DIAGONAL)]
IN_RADIUS = 0.06  # m, closer to the axis of what it goes into an object that isn't held counts as placed


@dataclass(frozen=True)
class Grasp:
    """Where the fingers shall shut; they start to `closing` m above, and the hand sinks to `stop` m below."""

    point: np.ndarray  # (3,) m
    yaw: float  # of the finger axis from world y, rad
    top: float  # of the object, m
    closing: float
    stop: float


class Expert:
    """An Actor for tasks whose goal is one object on or in another; ignores the pixels."""

    num_images, uses_state = 0, False

    def __init__(self, sim: Simulator, *, rounding: float = 0.25) -> None:
        assert isinstance(sim, LiberoSimulator), "it reads LIBERO's own state"
        self._sim, self._rounding = sim, rounding
        environment = sim.environment
        goals = environment.parsed_problem["goal_state"]
        predicate, *names = goals[0]
        pick_and_place = len(goals) == 1 and predicate in ("on", "in") and names[0] in environment.objects_dict
        if not pick_and_place or not (names[1] in environment.objects_dict or names[1].endswith(PLACES)):
            raise ConfigError(
                f"no scripted expert for task {sim.task_id} of {sim.suite} ({sim.instruction}): "
                "it only puts one object on or in another"
            )
        self._object, self._target = names
        self._inside = predicate == "in"
        self._model: Any = None

    def chunk(self, frame: Any, instruction: str, wrist: Any = None, state: Any = None) -> np.ndarray:
        """(1, 7) float32 in the policy's convention, from the simulator's present state."""
        self._read()
        if self._held():
            action = self._carry()
        elif self._placed():
            action = np.array([0, 0, 1, 0, 0, 0, OPEN], dtype=np.float64)
        else:
            action = self._reach(self._grasp())
        action[:6] = np.clip(np.round(action[:6] / self._rounding) * self._rounding, -1, 1)
        return (action + 0.0).astype(np.float32)[None]  # + 0.0: no negative zeros

    # --- reading the state ------------------------------------------------------------------------------------------

    def _read(self) -> None:
        environment = self._sim.environment
        robot = environment.robots[0]
        self._data = environment.sim.data._data
        if self._model is not environment.sim.model._model:  # a reset has built a new one
            self._model = environment.sim.model._model
            self._base = np.array(robot.base_pos)  # (3,) at the table's height
            self._shapes = Shapes(self._model)
            self._body = environment.obj_body_id[self._object]
            self._extent = self._shapes.extent(self._body)
            self._side = self._choose_side()
        fingers = self._data.qpos[robot._ref_gripper_joint_pos_indexes]
        parts = [robot.gripper.important_geoms[name] for name in ("left_finger", "right_finger")]
        self._fingers = [[self._model.geom(name).id for name in part] for part in parts]
        axis = self._data.geom_xpos[self._fingers[1][-1]] - self._data.geom_xpos[self._fingers[0][-1]]
        self._elbow = float(self._data.qpos[robot._ref_joint_pos_indexes[3]])  # 0: the arm is straight
        self._hand = self._data.site_xpos[robot.eef_site_id].copy()
        self._opening = float(fingers[0] - fingers[1])
        self._yaw = float(np.arctan2(-axis[0], axis[1]))  # 0: the fingers open along world y
        self._palm = self._data.site_xmat[robot.eef_site_id].reshape(3, 3)[:, 2].copy()  # (3,) where the fingers point
        self._position = self._data.xpos[self._body].copy()
        self._rotation = self._data.xmat[self._body].reshape(3, 3)

    def _target_point(self, data: Any = None) -> np.ndarray:
        """(3,) m: the target object's body, or the middle of the target region."""
        environment, data = self._sim.environment, data or self._data
        if self._target in environment.obj_body_id:
            return data.xpos[environment.obj_body_id[self._target]].copy()
        return data.site_xpos[self._model.site(self._target).id].copy()

    def _held(self) -> bool:
        """Whether both fingers touch the object, or one does and nothing else: a pad that loses touch for a step lets nothing go."""
        pairs = self._data.contact.geom  # (contacts, 2)
        partners = np.concatenate([pairs, pairs[:, ::-1]])
        touching = partners[self._shapes.owner[partners[:, 1]] == self._body, 0]
        fingers = [np.isin(touching, finger) for finger in self._fingers]
        by_one = bool(len(touching)) and self._opening < SHUT and bool(np.logical_or(*fingers).all())
        return by_one or all(finger.any() for finger in fingers)

    def _placed(self) -> bool:
        offset = self._position - self._target_point()
        if self._inside:  # it may be falling
            return bool(np.linalg.norm(offset[:2]) < IN_RADIUS)
        return bool(np.linalg.norm(offset[:2]) < ON_RADIUS) and offset[2] < 0.08

    # --- where to grasp ---------------------------------------------------------------------------------------------

    def _grasp(self) -> Grasp:
        lower, upper = self._extent
        corners = np.array(list(itertools.product(*zip(lower, upper, strict=True))))  # (8, 3)
        world = self._position + corners @ self._rotation.T
        top = float(world[:, 2].max())
        if "bowl" in self._object:
            point = np.append(self._position[:2] + self._side * (float(upper[0]) - RIM_INSET), top - RIM_DEPTH)
            yaw = _yaw_along(np.append(self._side, 0.0))
            return Grasp(point=point, yaw=yaw, top=top, closing=RIM_CLOSING, stop=RIM_STOP)
        centre = world.mean(axis=0)
        size = (upper - lower) / 2
        vertical = int(np.argmax(np.abs(self._rotation[2])))
        across = [axis for axis in range(3) if axis != vertical]
        # the narrower side, or where both fit about equally the one that needs the least turning
        cost = [max(size[axis], 0.034) + 0.004 * abs(_yaw_along(self._rotation[:, axis])) for axis in across]
        yaw = _yaw_along(self._rotation[:, across[int(np.argmin(cost))]])
        centre[2] = max(centre[2], top - BOX_DEPTH, float(world[:, 2].min()) + FINGERTIP)
        return Grasp(point=centre, yaw=yaw, top=top, closing=BOX_CLOSING, stop=BOX_STOP)

    def _choose_side(self) -> np.ndarray:
        """(2,) direction from the bowl's centre to where its rim is grasped: the same for all states of a task.

        It faces the middle of the table (or the robot, where the arm is stretched), unless something is in the way
        there in some of the stored states. Choosing by the present state would teach a policy the mean of two sides.
        """
        import mujoco

        scratch: Any = mujoco.MjData(self._model)  # pyright: ignore[reportAttributeAccessIssue]
        states = self._sim.task.init_states[:VOTERS, 1 : 1 + self._model.nq]
        votes = []
        for positions in states:
            scratch.qpos[:] = positions
            mujoco.mj_kinematics(self._model, scratch)  # pyright: ignore[reportAttributeAccessIssue]
            votes.append([self._is_free(np.array(side), scratch) for side in SIDES])
        free = np.mean(votes, axis=0)  # (sides,) share of the states
        bowls = states[:, self._model.jnt_qposadr[self._model.body_jntadr[self._body]] + np.arange(3)]  # (states, 3)
        x, y, z = np.median(bowls, axis=0) - self._base
        inward = -1.0 if y > -0.04 else 1.0
        wanted = [(0.0, inward), (0.0, -inward), (1.0, 0.0), (-1.0, 0.0)]
        if z > HIGH or x > OUT_OF_REACH:
            wanted.insert(0, (-DIAGONAL, inward * DIAGONAL))
        clear = [side for side in wanted if free[SIDES.index(side)] > NEARLY_ALL]
        return np.array(clear[0] if clear else wanted[0])

    def _is_free(self, side: np.ndarray, data: Any) -> bool:
        """Whether nothing stands where the outer finger goes down, nor beside the hand here and at the target."""
        bowl, target = data.xpos[self._body], self._target_point(data)
        centre, half = self._shapes.boxes(data, self._shapes.others(self._body))
        height, radius, rim = centre[:, 2] + half[:, 2], self._extent[1][0], self._extent[1][2]
        gap = np.maximum(np.abs(centre[:, :2] - bowl[:2] - side * (radius + FINGER_REACH)) - half[:, :2], 0)
        if np.any((np.linalg.norm(gap, axis=1) < FINGER_RADIUS) & (height > bowl[2] + rim - FINGER_DEPTH)):
            return False
        hand = np.abs(side) * HAND[0] + (1 - np.abs(side)) * HAND[1]
        for place in (bowl, target):
            beside = np.abs(centre[:, :2] - place[:2] - side * radius) < half[:, :2] + hand
            if np.any(beside.all(axis=1) & (height > place[2] + rim + HAND[2])):
                return False
        return True

    # --- moving -----------------------------------------------------------------------------------------------------

    def _reach(self, grasp: Grasp) -> np.ndarray:
        error = grasp.point - self._hand
        lateral = float(np.linalg.norm(error[:2]))
        turn = _wrap(grasp.yaw - self._yaw)
        aligned = lateral < ALIGNED and abs(turn) < 0.15
        far = grasp.point[0] - self._base[0] > FAR
        action = np.zeros(7)
        action[:2] = np.clip(GAIN * error[:2], -1, 1)
        action[5] = np.clip(TURN_GAIN * turn, -1, 1)
        if far:
            action[3:5] = TURN_GAIN * self._lean() if (unlocking := self._unlock(error)) is None else unlocking
        if aligned and -error[2] < grasp.closing and self._opening > MISSED:
            action[:2] *= np.abs(error[:2]) > STEADY
            stretched = far or grasp.top > self._base[2] + HIGH
            speed = STRETCHED_SPEED if stretched else CLOSING_SPEED
            action[2] = speed if error[2] < grasp.stop else 0.0
            action[6] = CLOSE
            return action
        if self._opening < 0.06:  # the fingers closed on nothing, or haven't opened yet: above the object first
            height = grasp.top + 0.05
        else:
            slope = min(0.7 * max(lateral - ALIGNED, 0.0), HOVER) + (0.0 if abs(turn) < 0.15 else 0.03)
            height = grasp.point[2] + grasp.closing - 0.015 + slope
            if not aligned:
                height = max(height, grasp.top + 0.02)
        rise = height - self._hand[2]
        action[2] = np.clip(GAIN * rise, -1, 1)
        action[:2] *= np.clip(1.5 - rise / 0.03, 0, 1)  # first up, then across
        action[6] = OPEN
        return action

    def _carry(self) -> np.ndarray:
        target = self._target_point()
        error = target[:2] - self._position[:2]
        lateral = float(np.linalg.norm(error))
        own_centre, own_half = self._shapes.boxes(self._data, self._shapes.own(self._body))
        bottom = float((own_centre[:, 2] - own_half[:, 2]).min())
        place = target[2] + (0.10 if self._inside else -0.02)  # dropped from there, or pressed down
        over = max(self._obstacle_top(target, bottom), place) + CLEARANCE
        approach = np.clip((lateral - 0.012) / 0.04, 0, 1)
        height = place + approach * (over - place) if (near := lateral < 0.06) else over
        rise = height - bottom
        action = np.zeros(7)
        action[:2] = np.clip(GAIN * error, -1, 1) * np.clip(1.4 - rise / 0.03, 0, 1)
        action[2] = np.clip(GAIN * rise, SETTING_DOWN if near and not self._inside else -1, 1)
        action[6] = OPEN if self._inside and lateral < DROP_RADIUS and rise > -DROP_HEIGHT else CLOSE
        if (unlocking := self._unlock(error)) is not None:
            action[3:5] = unlocking
        elif np.linalg.norm(self._lean()) > LEANING and ALIGNED < lateral < ARRIVING:
            action[3:5] = np.clip(TURN_GAIN * self._lean(), -LEAN_SPEED, LEAN_SPEED)
        return action

    def _lean(self) -> np.ndarray:
        """(2,) rad about world x and y that put the hand upright."""
        return np.cross(self._palm, (0.0, 0.0, -1.0))[:2]

    def _unlock(self, error: np.ndarray) -> np.ndarray | None:
        """(2,) commands about world x and y that lean the fingers towards the robot, where a straight arm is to bring the hand nearer to it."""
        x, y = inward = (self._base - self._hand)[:2]
        stuck = self._elbow > STRAIGHT and error[:2] @ inward > 0
        return LEAN_SPEED * np.array([y, -x]) / np.hypot(x, y) if stuck else None

    def _obstacle_top(self, target: np.ndarray, bottom: float) -> float:
        """Height of what the object is above, or gets closer to on its way to the target (m)."""
        centre, half = self._shapes.boxes(self._data, self._shapes.others(self._body))
        path = np.linspace(self._position[:2], target[:2], 9)  # (9, 2)
        gap = np.linalg.norm(np.maximum(np.abs(centre[:, None, :2] - path) - half[:, None, :2], 0), axis=2)  # (n, 9)
        top = centre[:, 2] + half[:, 2]
        below = top < bottom + 0.01
        blocking = (gap.min(axis=1) < PASSING) & (below | (gap.min(axis=1) < gap[:, 0]))
        return float(top[blocking].max(initial=target[2]))


def _wrap(angle: float) -> float:
    """To (-pi/2, pi/2]: a gripper turned by half a turn grasps the same."""
    return float(-((-angle + np.pi / 2) % np.pi) + np.pi / 2)


def _yaw_along(direction: np.ndarray) -> float:
    """Yaw that brings the finger axis (world y at yaw 0) along a horizontal direction."""
    return _wrap(float(np.arctan2(-direction[0], direction[1])))
