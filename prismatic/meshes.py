"""Meshes drawn with fewer triangles: LIBERO's scene has 290,000 for images of 256 pixels, and a CPU spends nine tenths of a frame on them.

What is drawn changes, not what collides: a renderer reads the triangles once, when it is made, and they are put back after that.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

MESH = 7  # mujoco.mjtGeom.mjGEOM_MESH
DRAWN_GROUP = 1  # geoms that are meant to be seen; group 0 is what collides
NEAR_CELL = 0.002  # m: of objects and fingers, which the wrist camera sees from 10 cm
FAR_CELL = 0.008  # m: of the arm and its pedestal
FAR_BODIES = ("robot0", "mount0")  # how their names begin


def merged_vertices(vertices: np.ndarray, faces: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Merge the vertices of each cube of `cell` m (Rossignac and Borrel 1993) → numbers of the triangles that are left, and those triangles.

    vertices (V, 3) m, faces (F, 3) of their numbers → (N,) and (N, 3). A cube is represented by the vertex nearest to the mean of its own, so
    that normals and texture coordinates stay those of the original; triangles within one cube or between the same three vanish.
    """
    _, cube = np.unique(np.floor(vertices / cell).astype(np.int64), axis=0, return_inverse=True)
    cube = cube.ravel()
    sizes = np.bincount(cube)
    means = np.stack([np.bincount(cube, vertices[:, axis]) for axis in range(3)], axis=1) / sizes[:, None]
    by_distance = np.lexsort((((vertices - means[cube]) ** 2).sum(axis=1), cube))
    representatives = by_distance[np.cumsum(sizes) - sizes]

    corners = cube[faces]
    spread = (corners != np.roll(corners, 1, axis=1)).all(axis=1)
    turned = (corners.argmin(axis=1)[:, None] + np.arange(3)) % 3  # one order for the three rotations of a triangle
    _, first = np.unique(np.take_along_axis(corners, turned, axis=1)[spread], axis=0, return_index=True)
    left = np.flatnonzero(spread)[np.sort(first)]
    return left, representatives[corners[left]]


@contextlib.contextmanager
def fewer_triangles(model: Any) -> Iterator[None]:
    """Within it an MjModel's drawn meshes have fewer triangles."""
    names = ("mesh_face", "mesh_facenum", "mesh_facenormal", "mesh_facetexcoord")
    whole = {name: getattr(model, name).copy() for name in names}
    try:
        for geom in np.flatnonzero((model.geom_group == DRAWN_GROUP) & (model.geom_type == MESH)):
            mesh = model.geom_dataid[geom]
            start, number = model.mesh_faceadr[mesh], whole["mesh_facenum"][mesh]
            vertices = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
            far = model.body(model.geom_bodyid[geom]).name.startswith(FAR_BODIES)
            of_this = slice(start, start + number)
            left, faces = merged_vertices(vertices, whole["mesh_face"][of_this], FAR_CELL if far else NEAR_CELL)
            if len(left):
                drawn = slice(start, start + len(left))
                model.mesh_face[drawn], model.mesh_facenum[mesh] = faces, len(left)
                for name in ("mesh_facenormal", "mesh_facetexcoord"):
                    getattr(model, name)[drawn] = whole[name][of_this][left]
        yield
    finally:
        for name, values in whole.items():
            getattr(model, name)[:] = values
