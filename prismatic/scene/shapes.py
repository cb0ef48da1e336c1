"""What stands in a MuJoCo scene, as boxes: each solid shape's axis-aligned box, and whose shape it is.

For the scripted expert, which asks what is in its way. The robot, the table and planes are left out.
"""

from typing import Any

import numpy as np

ROBOT_PARTS = ("robot0", "gripper0", "mount0")
FURNITURE_SIZE = 0.4  # m, half size from which on a shape is a table or a wall
PLANE = 0  # MuJoCo's geom type


class Shapes:
    """The solid shapes of a MuJoCo model. Of each shape (ngeom,): `owner`, id of its outermost body; `solid`, `robot`: bool."""

    def __init__(self, model: Any) -> None:
        outermost = np.arange(model.nbody)
        for body in range(1, model.nbody):  # a parent's id is smaller than its children's
            parent = model.body_parentid[body]
            outermost[body] = body if parent == 0 else outermost[parent]
        self._model = model
        self._box = model.geom_aabb.copy()  # (ngeom, 6): centre and half sizes in the shape's own frame
        self.owner = outermost[model.geom_bodyid]
        robot = [model.body(body).name.startswith(ROBOT_PARTS) for body in range(model.nbody)]
        self.robot = np.array(robot)[model.geom_bodyid]
        self.solid = (model.geom_contype > 0) | (model.geom_conaffinity > 0)
        small = (self._box[:, 3:].max(axis=1) < FURNITURE_SIZE) & (model.geom_type != PLANE)
        self._things = self.solid & small & ~self.robot

    def others(self, body: int) -> np.ndarray:
        """(ngeom,) bool: the shapes that aren't the body's."""
        return self._things & (self.owner != body)

    def own(self, body: int) -> np.ndarray:
        """(ngeom,) bool: the body's shapes."""
        return self._things & (self.owner == body)

    def boxes(self, data: Any, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Centres (n, 3) and half sizes (n, 3) of the chosen shapes' axis-aligned boxes in the world, m."""
        rotation = data.geom_xmat[chosen].reshape(-1, 3, 3)
        centre = data.geom_xpos[chosen] + np.einsum("nij,nj->ni", rotation, self._box[chosen, :3])
        return centre, np.einsum("nij,nj->ni", np.abs(rotation), self._box[chosen, 3:])

    def extent(self, body: int) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner (3,) of a body's shapes in the body's own frame, m."""
        from scipy.spatial.transform import Rotation

        chosen = self.own(body) & (self._model.geom_bodyid == body)
        # scipy wants MuJoCo's w last
        rotation = Rotation.from_quat(np.roll(self._model.geom_quat[chosen], -1, axis=1)).as_matrix()  # (n, 3, 3)
        centre = self._model.geom_pos[chosen] + np.einsum("nij,nj->ni", rotation, self._box[chosen, :3])
        half = np.einsum("nij,nj->ni", np.abs(rotation), self._box[chosen, 3:])
        return (centre - half).min(axis=0), (centre + half).max(axis=0)
