"""A hand for failures made on purpose: the scripted expert for any object and target of a scene, and a few plain motions."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from prismatic.expert import RIM_CLOSING, RIM_DEPTH, RIM_STOP, Expert, Grasp
from prismatic.simulator import LiberoSimulator

Actions = Iterator[np.ndarray]
OPEN, CLOSE = 1.0, 0.0


class Hand(Expert):
    """The expert for any object and target of a scene, and a few plain motions."""

    def __init__(
        self,
        sim: LiberoSimulator,
        thing: str = "",
        target: str = "",
        *,
        inside: bool = False,
        rim: tuple[float, float] | None = None,
    ) -> None:
        """inside: let it fall in. rim: (x, y) m from its origin to the wall that is grasped, across y; None: as the expert does."""
        self._sim, self._rounding, self._model = sim, 0.25, None
        self._object, self._target, self._inside, self._rim = thing, target, inside, rim
        self.shift = np.zeros(3)  # m, added to the target

    def _grasp(self) -> Grasp:
        if self._rim is None:
            return super()._grasp()
        x, y, top = self._position + np.array([*self._rim, self._extent[1][2]])
        return Grasp(
            point=np.array([x, y, top - RIM_DEPTH]), yaw=0.0, top=float(top), closing=RIM_CLOSING, stop=RIM_STOP
        )

    def _target_point(self, data: Any = None) -> np.ndarray:
        return super()._target_point(data) + self.shift

    def work(self, steps: int = 200, until: Callable[["Hand"], bool] = lambda hand: False) -> Actions:
        """What the expert would do."""
        for _ in range(steps):
            action = self.chunk(None, "")[0]
            if until(self):
                return
            yield action

    def go(
        self,
        point: np.ndarray,
        gripper: float,
        *,
        by: tuple[float, float, float] = (0, 0, 0),
        steps: int = 60,
        speed: float = 1.0,
        yaw: float | None = None,
        until: Callable[["Hand"], bool] = lambda hand: False,
    ) -> Actions:
        """Straight to a point (3,) m in the world, moved `by` an offset; where a yaw is given, turned to it, too."""
        point = point + np.array(by)
        for _ in range(steps):
            error, turn = point - self.hand, 0.0 if yaw is None else yaw - self.yaw
            if (np.linalg.norm(error) < 0.008 and abs(turn) < 0.1) or until(self):
                return
            yield np.array([*np.clip(20 * error, -speed, speed), 0, 0, np.clip(4 * turn, -1, 1), gripper])

    @property
    def _scene(self) -> tuple[Any, Any, Any]:
        """robosuite's environment, MuJoCo's model and data."""
        environment = self._sim.environment
        return environment, environment.sim.model._model, environment.sim.data._data

    def value(self, joint: str) -> float:
        """Of a drawer, door or knob: m or rad."""
        _, model, data = self._scene
        return float(data.qpos[model.jnt_qposadr[model.joint(joint).id]])

    def handle(self, drawer: str) -> np.ndarray:
        """(3,) m, the middle of a drawer's handle: the shape nearest to the table's middle, to which drawers open along y."""
        _, model, data = self._scene
        shapes = np.flatnonzero(model.geom_bodyid == model.jnt_bodyid[model.joint(drawer).id])
        solid = shapes[(model.geom_contype[shapes] > 0) | (model.geom_conaffinity[shapes] > 0)]
        return data.geom_xpos[solid[np.abs(data.geom_xpos[solid, 1]).argmin()]].copy()

    @property
    def hand(self) -> np.ndarray:
        environment, _, data = self._scene
        return data.site_xpos[environment.robots[0].eef_site_id].copy()

    @property
    def yaw(self) -> float:
        """rad, of the finger axis, right-handed about the world's vertical."""
        environment, model, data = self._scene
        parts = [environment.robots[0].gripper.important_geoms[name][-1] for name in ("left_finger", "right_finger")]
        left, right = (data.geom_xpos[model.geom(name).id] for name in parts)
        return float(np.arctan2(right[1] - left[1], right[0] - left[0]))

    def place(self, name: str) -> np.ndarray:
        """(3,) of an object, a fixture's part or a region."""
        environment, model, data = self._scene
        if name in environment.obj_body_id:
            return data.xpos[environment.obj_body_id[name]].copy()
        return data.site_xpos[model.site(name).id].copy()


def still(gripper: float, steps: int) -> Actions:
    for _ in range(steps):
        yield np.array([0, 0, 0, 0, 0, 0, gripper])


def held(hand: Hand) -> bool:
    return hand._held()


class Script:
    """A policy that plays the actions of a generator, then stands still."""

    num_images, uses_state = 0, False

    def __init__(self, sim: LiberoSimulator, play: Callable[[LiberoSimulator], Actions]) -> None:
        self._sim, self._play, self._gripper = sim, play, OPEN
        self._actions: Actions | None = None

    def chunk(self, frame: Any, instruction: str, wrist: Any = None, state: Any = None) -> np.ndarray:
        if self._actions is None:
            self._actions = self._play(self._sim)
        action = next(self._actions, np.array([0, 0, 0, 0, 0, 0, self._gripper]))
        self._gripper = action[6]
        return action[None]
