"""A scripted pick-and-place policy that reads the simulator's state: what a demonstration is made of.

It is called like any policy, and its answer depends on the present state alone (no memory), so it can also label states
that it would never reach itself. Made to be imitated from pictures by arg-max: the same state always gets the same
answer, commands are multiples of `rounding`, and nothing waits: the fingers close while the hand still sinks the last
centimetres, and the lift starts at the first touch of both pads.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from prismatic.errors import ConfigError
from prismatic.simulator import Simulator

GAIN = 32.0  # command per metre of error: full speed (about 13 mm a step) from 3 cm on
LOOK_AHEAD = 0.06  # s, how far ahead the hand's position is predicted: it coasts for about that long
TURN_GAIN = 2.5  # command per radian of error
FAR = 0.7  # m before the robot's base, from where on the arm is so stretched that the hand leans more and more
OPEN, CLOSE = 1.0, 0.0

RIM_INSET = 0.003  # m, aim this far inside a bowl's outer radius
RIM_DEPTH = 0.024  # m, pads' centre below the rim when the fingers are shut
BOX_DEPTH = 0.028  # m, the same for the top of a box, can or bottle
RIM_CLOSING = 0.036  # m above the grasp at which the fingers start to close: they need ten steps to a bowl's rim
BOX_CLOSING = 0.012  # m, the same for a box, which they reach sooner and must not close above
CLOSING_SPEED = -0.25  # command at which the hand sinks while the fingers close
STEADY = 0.008  # m, lateral error that is left alone while the fingers close
RIM_STOP = 0.004  # m below the grasp point, where it sinks no further
BOX_STOP = -0.003  # m, the same for a box: fingers pressed on the table rub and don't close
FINGERTIP = 0.014  # m, lowest pads' centre above what a box stands on
ALIGNED = 0.015  # m, lateral error that lets the hand sink and the fingers close
MISSED = 0.004  # m, a finger opening at which nothing can be between the pads
FINGER_RADIUS = 0.03  # m, room that an open finger needs around it
OUT_OF_REACH = 0.75  # m before the robot's base, from where on the same holds
HIGH = 0.2  # m above the table from where on the stretched arm hardly reaches the far half of an object
HAND = (0.11, 0.035, 0.03)  # m, half sizes of the hand along and across the fingers, and its lowest above the rim
HOVER = 0.1  # m above the grasp, while the hand is still far away
CLEARANCE = 0.03  # m between the carried object and what it passes over
DROP_RADIUS = 0.022  # m, lateral error at which the fingers open
ON_RADIUS, IN_RADIUS = 0.04, 0.06  # m, closer to the target's axis an object that isn't held counts as placed


@dataclass(frozen=True)
class Grasp:
    """Where the fingers shall shut, `closing` metres above which they start to and `stop` metres below which the hand doesn't go."""

    point: np.ndarray  # (3,) m
    yaw: float  # of the finger axis from world y, rad
    top: float  # of the object, m
    closing: float
    stop: float


class Expert:
    """`expert(frame, instruction) -> (7,)` for tasks whose goal is one object on or in another; ignores the pixels."""

    num_images = 0

    def __init__(self, sim: Simulator, *, rounding: float = 0.25) -> None:
        self._sim, self._rounding = sim, rounding
        environment = sim.environment
        goals = environment.parsed_problem["goal_state"]
        predicate, *names = goals[0]
        supported = len(goals) == 1 and predicate in ("on", "in") and names[0] in environment.objects_dict
        if not supported or names[1].startswith("main_table") or "region" in names[1].replace("contain_region", "").replace("cook_region", ""):
            raise ConfigError(
                f"no scripted expert for task {sim.task_id} of {sim.suite} ({sim.instruction}): it only puts one object on or in another"
            )
        self._object, self._target = names
        self._inside = predicate == "in"
        self._model: Any = None

    def reset(self) -> None:
        """Nothing to forget: there for callers that reset every policy."""

    def card(self) -> dict[str, Any]:
        """What an evaluation's summary says about this policy."""
        return {"policy": "scripted expert", "rounding": self._rounding}

    def __call__(self, frame: Any, instruction: str, wrist: Any = None) -> np.ndarray:
        """(7,) float32 in the policy's convention, from the simulator's present state."""
        self._read()
        if self._held():
            action = self._carry()
        elif self._placed():
            action = np.array([0, 0, 1, 0, 0, 0, OPEN], dtype=np.float64)
        else:
            action = self._reach(self._grasp())
        action[:6] = np.clip(np.round(action[:6] / self._rounding) * self._rounding, -1, 1)
        return (action + 0.0).astype(np.float32)  # + 0.0: no negative zeros

    # --- reading the state ------------------------------------------------------------------------------------------

    def _read(self) -> None:
        environment = self._sim.environment
        self._data = environment.sim.data._data
        if self._model is not environment.sim.model._model:
            self._model = environment.sim.model._model
            self._shapes = _collision_shapes(self._model)
            self._body = environment.obj_body_id[self._object]
            self._extent = _extent(self._model, self._body, self._shapes)
        robot = environment.robots[0]
        self._base = np.array(robot.base_pos)  # (3,) at the table's height
        fingers = self._data.qpos[robot._ref_gripper_joint_pos_indexes]
        parts = [robot.gripper.important_geoms[name] for name in ("left_finger", "right_finger")]
        self._fingers = [[self._model.geom(name).id for name in part] for part in parts]
        axis = self._data.geom_xpos[self._fingers[1][-1]] - self._data.geom_xpos[self._fingers[0][-1]]
        self._hand = self._data.site_xpos[robot.eef_site_id].copy()
        self._ahead = LOOK_AHEAD * np.array(environment.sim.data.get_site_xvelp(robot.gripper.important_sites["grip_site"]))
        self._opening = float(fingers[0] - fingers[1])
        self._yaw = float(np.arctan2(-axis[0], axis[1]))  # 0: the fingers open along world y
        self._palm = self._data.site_xmat[robot.eef_site_id].reshape(3, 3)[:, 2].copy()  # (3,) where the fingers point
        self._position = self._data.xpos[self._body].copy()
        self._rotation = self._data.xmat[self._body].reshape(3, 3)

    def _target_point(self) -> np.ndarray:
        environment = self._sim.environment
        if self._target in environment.obj_body_id:
            return self._data.xpos[environment.obj_body_id[self._target]].copy()
        return np.array(environment.sim.data.get_site_xpos(self._target))

    def _held(self) -> bool:
        """Whether both fingers touch the object."""
        pairs = self._data.contact.geom  # (contacts, 2)
        partners = np.concatenate([pairs, pairs[:, ::-1]])
        touching = partners[self._shapes.owner[partners[:, 1]] == self._body, 0]
        return all(np.isin(touching, finger).any() for finger in self._fingers)

    def _placed(self) -> bool:
        offset = self._position - self._target_point()
        if self._inside:  # it may be falling
            return bool(np.linalg.norm(offset[:2]) < IN_RADIUS)
        return bool(np.linalg.norm(offset[:2]) < ON_RADIUS) and offset[2] < 0.08

    # --- where to grasp ---------------------------------------------------------------------------------------------

    def _grasp(self) -> Grasp:
        lower, upper = self._extent
        corners = np.array([[x, y, z] for x in (lower[0], upper[0]) for y in (lower[1], upper[1]) for z in (lower[2], upper[2])])
        world = self._position + corners @ self._rotation.T
        top = float(world[:, 2].max())
        if "bowl" in self._object:
            return self._rim_grasp(top, radius=float(upper[0]))
        centre = world.mean(axis=0)
        size = (upper - lower) / 2
        vertical = int(np.argmax(np.abs(self._rotation[2])))
        across = [axis for axis in range(3) if axis != vertical]
        # the narrower side, or where both fit about equally the one that needs the least turning
        cost = [max(size[axis], 0.034) + 0.004 * abs(_yaw_along(self._rotation[:, axis])) for axis in across]
        yaw = _yaw_along(self._rotation[:, across[int(np.argmin(cost))]])
        centre[2] = max(centre[2], top - BOX_DEPTH, float(world[:, 2].min()) + FINGERTIP)
        return Grasp(point=centre, yaw=yaw, top=top, closing=BOX_CLOSING, stop=BOX_STOP)

    def _rim_grasp(self, top: float, *, radius: float) -> Grasp:
        """The side of the rim that faces the middle of the table, unless something stands where the outer finger goes."""
        inward = -1.0 if self._position[1] > -0.04 else 1.0
        sides = [(0.0, inward), (0.0, -inward), (1.0, 0.0), (-1.0, 0.0)]
        if top > self._base[2] + HIGH or self._position[0] - self._base[0] > OUT_OF_REACH:
            sides.insert(0, (-np.sqrt(0.5), inward * np.sqrt(0.5)))
        free = [side for side in sides if self._is_free(np.array(side), top, radius)]
        side = np.array(free[0] if free else sides[0])
        point = np.append(self._position[:2] + side * (radius - RIM_INSET), top - RIM_DEPTH)
        return Grasp(point=point, yaw=_yaw_along(np.append(side, 0.0)), top=top, closing=RIM_CLOSING, stop=RIM_STOP)

    def _is_free(self, side: np.ndarray, top: float, radius: float) -> bool:
        """Whether nothing stands where the outer finger goes down, nor beside the hand here and at the target."""
        centre, half = self._shapes.boxes(self._data, self._shapes.others(self._body))
        height = centre[:, 2] + half[:, 2]
        finger = self._position[:2] + side * (radius + 0.045)
        gap = np.maximum(np.abs(centre[:, :2] - finger) - half[:, :2], 0)
        if np.any((np.linalg.norm(gap, axis=1) < FINGER_RADIUS) & (height > top - 0.02)):
            return False
        target = self._target_point()
        for place, rim in ((self._position, top), (target, target[2] + top - self._bottom())):
            hand = np.abs(side) * HAND[0] + (1 - np.abs(side)) * HAND[1]
            beside = np.abs(centre[:, :2] - place[:2] - side * radius) < half[:, :2] + hand
            if np.any(beside.all(axis=1) & (height > rim + HAND[2])):
                return False
        return True

    # --- moving -----------------------------------------------------------------------------------------------------

    def _reach(self, grasp: Grasp) -> np.ndarray:
        error = grasp.point - self._hand
        ahead = error - self._ahead
        lateral = float(np.linalg.norm(error[:2]))
        turn = _wrap(grasp.yaw - self._yaw)
        aligned = lateral < ALIGNED and abs(turn) < 0.15
        action = np.zeros(7)
        action[:2] = np.clip(GAIN * ahead[:2], -1, 1)
        action[5] = np.clip(TURN_GAIN * turn, -1, 1)
        if grasp.point[0] - self._base[0] > FAR:
            action[3:5] = TURN_GAIN * np.cross(self._palm, (0.0, 0.0, -1.0))[:2]
        if aligned and -error[2] < grasp.closing and self._opening > MISSED:
            action[:2] *= np.abs(error[:2]) > STEADY
            action[2] = CLOSING_SPEED if error[2] < grasp.stop else 0.0
            action[6] = CLOSE
            return action
        if self._opening < 0.06:  # the fingers closed on nothing, or haven't opened yet: above the object first
            height = grasp.top + 0.05
        else:
            slope = min(0.7 * max(lateral - ALIGNED, 0.0), HOVER) + (0.0 if abs(turn) < 0.15 else 0.03)
            height = grasp.point[2] + grasp.closing - 0.015 + slope
            if not aligned:
                height = max(height, grasp.top + 0.02)
        rise = height - self._hand[2] - self._ahead[2]
        action[2] = np.clip(GAIN * rise, -1, 1)
        action[:2] *= np.clip(1.5 - rise / 0.03, 0, 1)  # first up, then across
        action[6] = OPEN
        return action

    def _carry(self) -> np.ndarray:
        target = self._target_point()
        error = target[:2] - self._position[:2]
        lateral = float(np.linalg.norm(error))
        error = error - self._ahead[:2]
        bottom = self._bottom()
        place = target[2] + (0.10 if self._inside else 0.0)
        over = max(self._obstacle_top(target), place) + CLEARANCE
        approach = np.clip((lateral - 0.012) / 0.04, 0, 1)
        height = place + approach * (over - place) if lateral < 0.06 else over
        rise = height - bottom - self._ahead[2]
        action = np.zeros(7)
        action[:2] = np.clip(GAIN * error, -1, 1) * np.clip(1.4 - rise / 0.03, 0, 1)
        action[2] = np.clip(GAIN * rise, -1, 1)
        action[6] = CLOSE
        if lateral < DROP_RADIUS and rise > -0.02:
            action[6] = OPEN
        return action

    def _bottom(self) -> float:
        centre, half = self._shapes.boxes(self._data, self._shapes.owner == self._body)
        return float((centre[:, 2] - half[:, 2]).min())

    def _obstacle_top(self, target: np.ndarray) -> float:
        """Height of what the object gets closer to on its way to the target (m)."""
        centre, half = self._shapes.boxes(self._data, self._shapes.others(self._body))
        path = np.linspace(self._position[:2], target[:2], 9)  # (9, 2)
        gap = np.linalg.norm(np.maximum(np.abs(centre[:, None, :2] - path) - half[:, None, :2], 0), axis=2)  # (n, 9)
        blocking = (gap.min(axis=1) < 0.06) & (gap.min(axis=1) < gap[:, 0])
        return float((centre[:, 2] + half[:, 2])[blocking].max(initial=target[2]))


class _Shapes:
    """The model's collision shapes as boxes; `owner` (ngeom,) is the object or fixture that each one belongs to."""

    def __init__(self, model: Any) -> None:
        top_body = np.arange(model.nbody)
        for body in range(1, model.nbody):
            parent = model.body_parentid[body]
            top_body[body] = body if parent == 0 else top_body[parent]
        names = [model.body(body).name for body in range(model.nbody)]
        self._aabb = model.geom_aabb.copy()
        self.owner = np.array([top_body[body] for body in model.geom_bodyid])
        robot = {i for i, name in enumerate(names) if name.startswith(("robot0", "gripper0", "mount0"))}
        solid = (model.geom_contype > 0) | (model.geom_conaffinity > 0)
        sizes = self._aabb[:, 3:].max(axis=1)
        self.solid = solid & np.array([body not in robot for body in model.geom_bodyid]) & (sizes < 0.4) & (model.geom_type > 0)

    def others(self, body: int) -> np.ndarray:
        """(ngeom,) bool: solid, not the robot's, not the table's, not this body's."""
        return self.solid & (self.owner != body)

    def boxes(self, data: Any, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Centres (n, 3) and half sizes (n, 3) of the chosen shapes' axis-aligned boxes in the world."""
        rotation = data.geom_xmat[chosen].reshape(-1, 3, 3)
        centre = data.geom_xpos[chosen] + np.einsum("nij,nj->ni", rotation, self._aabb[chosen, :3])
        return centre, np.einsum("nij,nj->ni", np.abs(rotation), self._aabb[chosen, 3:])


def _collision_shapes(model: Any) -> _Shapes:
    return _Shapes(model)


def _extent(model: Any, body: int, shapes: _Shapes) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner (3,) of a body's solid shapes in the body's own frame."""
    import mujoco

    lower, upper = np.full(3, np.inf), np.full(3, -np.inf)
    for geom in np.flatnonzero(shapes.solid & (model.geom_bodyid == body)):
        rotation = np.zeros(9)
        mujoco.mju_quat2Mat(rotation, model.geom_quat[geom])
        rotation = rotation.reshape(3, 3)
        centre = model.geom_pos[geom] + rotation @ model.geom_aabb[geom, :3]
        half = np.abs(rotation) @ model.geom_aabb[geom, 3:]
        lower, upper = np.minimum(lower, centre - half), np.maximum(upper, centre + half)
    return lower, upper


def _wrap(angle: float) -> float:
    """To (-pi/2, pi/2]: a gripper turned by half a turn grasps the same."""
    return float(-((-angle + np.pi / 2) % np.pi) + np.pi / 2)


def _yaw_along(direction: np.ndarray) -> float:
    """Yaw that brings the finger axis (world y at yaw 0) along a horizontal direction."""
    return _wrap(float(np.arctan2(-direction[0], direction[1])))
