"""Reads from MuJoCo's state, at each step, what the stages and the verdict of an episode are made of.

A few array reads and the contacts, about 0.05 ms a step; nothing is rendered. LIBERO's predicates are not evaluated
again: the recorder listens to the environment, which evaluates all of them after every step.
"""

import functools
from typing import Any

import numpy as np

from prismatic.scene.shapes import Shapes
from prismatic.scene.trajectory import MOVING, PLACING, Goal, JointGoal, Part, Place, Trajectory

HINGE, SLIDE = 3, 2  # MuJoCo's joint types
ON_RADIUS = 0.03  # m, LIBERO's own: between the origins of an object and of what it shall be on
OPPOSITE = {"open": "close", "close": "open", "turnon": "turnoff", "turnoff": "turnon"}
LEFT, RIGHT, REST = 1, 2, 3  # sides of the robot's geoms
SUPPORTING = 0.7  # least vertical part of a contact's normal


class SceneRecorder:
    """Watches an episode. Make one after each reset, with robosuite's environment; call `note` after each step."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._model, self._data = environment.sim.model._model, environment.sim.data._data
        self._shapes = Shapes(self._model)
        self._objects = list(environment.objects_dict)
        self._bodies = np.array([environment.obj_body_id[name] for name in self._objects], dtype=int)
        self._find_parts()
        self._find_robot()
        states = environment.parsed_problem["goal_state"]
        self._goals = [self._goal(*state) for state in states]
        self._asked_parts = sorted({goal.joint.part for goal in self._goals if goal.joint and not goal.place})
        self._boxes = np.array([self._box(body) for body in self._bodies]).reshape(-1, 2, 3)
        self._rows: list[dict[str, Any]] = []
        self._held: dict[tuple[str, ...], bool] = {}
        self._states = [tuple(state) for state in states]
        self._listen()
        environment._check_success()
        self.note(None)

    # --- what there is ----------------------------------------------------------------------------------------------

    def _find_parts(self) -> None:
        """Slides and hinges of all fixtures, and which geoms each of them moves."""
        model = self._model
        fixtures = self._environment.fixtures_dict.items()
        joints = [(model.joint(name).id, name, fixture) for fixture, thing in fixtures for name in thing.joints]
        joints = [joint for joint in joints if model.jnt_type[joint[0]] in (SLIDE, HINGE)]
        self._parts = [
            Part(name, fixture, hinge=bool(model.jnt_type[joint] == HINGE), span=float(np.ptp(model.jnt_range[joint])))
            for joint, name, fixture in joints
        ]
        found = np.array([joint for joint, _, _ in joints], dtype=int)
        self._addresses = model.jnt_qposadr[found]
        # A thing's number for each geom: an object's, len(objects) + a part's, or one past the last.
        bodies = [*self._bodies.tolist(), *model.jnt_bodyid[found].tolist()]
        numbers = {body: bodies.index(body) for body in bodies}
        thing_of_body = np.full(model.nbody, len(self._objects) + len(self._parts))
        for body in range(1, model.nbody):  # a parent's id is smaller than its children's
            thing_of_body[body] = numbers.get(body, thing_of_body[model.body_parentid[body]])
        self._thing = thing_of_body[model.geom_bodyid]
        things = range(len(self._objects), len(self._objects) + len(self._parts))
        self._part_geoms = [(self._thing == thing) & self._shapes.solid for thing in things]

    def _find_robot(self) -> None:
        model, robot = self._model, self._environment.robots[0]
        self._side = np.where(self._shapes.robot, REST, 0)
        for side, part in ((LEFT, "left_finger"), (RIGHT, "right_finger")):
            self._side[[model.geom(name).id for name in robot.gripper.important_geoms[part]]] = side
        self._grip = robot.eef_site_id
        self._fingers = np.array(robot._ref_gripper_joint_pos_indexes)

    def _goal(self, predicate: str, subject: str, target: str | None = None) -> Goal:
        if predicate in MOVING:
            return Goal(predicate, subject, target, joint=self._joint_goal(predicate, subject))
        if predicate not in PLACING or target is None or subject not in self._objects:
            return Goal(predicate, subject, target)
        region = self._environment.object_sites_dict.get(target)
        if region is None:
            _, half = self._box(self._environment.obj_body_id[target])
            return Goal(predicate, subject, target, Place(owner=target, outline=half, room=np.full(3, ON_RADIUS)))
        turn = self._data.site_xmat[self._model.site(target).id].reshape(3, 3)
        half = np.abs(turn @ np.asarray(region.size, dtype=np.float64))  # as LIBERO's own in_box
        joint = None
        if predicate == "in":  # into a drawer, or into what has one door
            only = not region.joints and sum(part.fixture == region.parent_name for part in self._parts) == 1
            joint = self._joint_goal("open", region.parent_name if only else target)
        return Goal(predicate, subject, target, Place(owner=region.parent_name, outline=half, room=half), joint)

    def _joint_goal(self, predicate: str, name: str) -> JointGoal | None:
        """Of the part that a fixture's or region's name stands for. All goals of LIBERO name one drawer, door or knob."""
        region = self._environment.object_sites_dict.get(name)
        joints = [part.name for part in self._parts if part.fixture == name] if region is None else region.joints or []
        part = next((number for number, part in enumerate(self._parts) if part.name in joints), None)
        if part is None:
            return None
        ranges = self._environment.fixtures_dict[self._parts[part].fixture].object_properties["articulation"]
        wanted, other = (ranges.get(f"default_{word}_ranges", []) for word in (predicate, OPPOSITE[predicate]))
        if not wanted or not other:
            return None
        # LIBERO's objects all take the end of the wanted range that is nearest to the opposite one as the threshold.
        sign = float(np.sign(np.mean(wanted) - np.mean(other)))
        return JointGoal(part=part, end=float(min(wanted) if sign > 0 else max(wanted)), sign=sign)

    def _box(self, body: int) -> tuple[np.ndarray, np.ndarray]:
        """Middle, from the body's origin, and half sizes (3,) of the body's box as it stands now."""
        own = self._shapes.own(body)
        if not own.any():
            return np.zeros(3), np.zeros(3)
        centre, half = self._shapes.boxes(self._data, own)
        lower, upper = (centre - half).min(axis=0), (centre + half).max(axis=0)
        return (lower + upper) / 2 - self._data.xpos[body], (upper - lower) / 2

    # --- watching ---------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Keep what the environment finds when it evaluates its predicates."""
        environment = self._environment
        evaluate = functools.partial(type(environment)._eval_predicate, environment)

        def remember(state: Any) -> bool:
            holds = evaluate(state)
            self._held[tuple(state)] = bool(holds)
            return holds

        environment._eval_predicate = remember

    def note(self, action: np.ndarray | None) -> None:
        """After a step with an action (7,) in the policy's convention (gripper 1 open, 0 close), or before the first (None)."""
        data = self._data
        fingers = data.qpos[self._fingers]
        self._rows.append(
            {
                "hand": data.site_xpos[self._grip].copy(),
                "opening": fingers[0] - fingers[1],
                "closing": action is not None and bool(action[6] < 0.5),
                "places": data.xpos[self._bodies],
                "upright": data.xmat[self._bodies, 6:],
                "touch": self._touch(),
                "offset": [self._offset(goal) for goal in self._goals],
                "values": data.qpos[self._addresses],
                "part_gap": self._part_gaps(),
                "held": [self._held[state] for state in self._states],
            }
        )

    def _touch(self) -> np.ndarray:
        pairs = self._data.contact.geom  # (contacts, 2)
        touch = np.zeros((len(self._objects) + len(self._parts) + 1, 3), dtype=bool)
        side = self._side[pairs]
        first, second = side[:, 0] > 0, side[:, 1] > 0
        if (first != second).any():
            for robot, other in ((0, first & ~second), (1, second & ~first)):
                touch[self._thing[pairs[other, 1 - robot]], side[other, robot] - 1] = True
        return touch[:-1]

    def _offset(self, goal: Goal) -> np.ndarray:
        if not goal.place:
            return np.zeros(3)
        bodies, data = self._environment.obj_body_id, self._data
        if goal.target in self._environment.object_sites_dict:
            return data.xpos[bodies[goal.subject]] - data.site_xpos[self._model.site(goal.target).id]
        return data.xpos[bodies[goal.subject]] - data.xpos[bodies[goal.target]]

    def _part_gaps(self) -> np.ndarray:
        gaps = np.full(len(self._parts), np.inf)
        hand = self._data.site_xpos[self._grip]
        for part in self._asked_parts:
            centre, half = self._shapes.boxes(self._data, self._part_geoms[part])
            gaps[part] = np.linalg.norm(np.maximum(np.abs(centre - hand) - half, 0), axis=1).min(initial=np.inf)
        return gaps

    def trajectory(self) -> Trajectory:
        """Everything noted since the reset."""
        return Trajectory(
            goals=self._goals,
            objects=self._objects,
            parts=self._parts,
            centre=self._boxes[:, 0],
            half=self._boxes[:, 1],
            supports=[self._supports(goal) for goal in self._goals],
            **{name: np.array([row[name] for row in self._rows]) for name in self._rows[0]},
        )

    def _supports(self, goal: Goal) -> list[str]:
        """Names of the objects and fixtures on which a goal's object rests now."""
        if goal.subject not in self._objects:
            return []
        names = {body: name for name, body in self._environment.obj_body_id.items()}
        body, contacts = self._environment.obj_body_id[goal.subject], self._data.contact
        owners = self._shapes.owner[contacts.geom]  # (contacts, 2)
        below = contacts.pos[:, 2] < self._data.xpos[body, 2] + self._boxes[self._objects.index(goal.subject), 0, 2]
        bearing = below & (np.abs(contacts.frame[:, 2]) > SUPPORTING)
        others = np.concatenate([owners[bearing & (owners[:, side] == body), 1 - side] for side in (0, 1)])
        return sorted({names[other] for other in others.tolist() if other in names and other != body})
