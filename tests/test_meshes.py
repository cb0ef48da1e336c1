"""meshes.py: fewer triangles that lie where the many did."""

from types import SimpleNamespace

import numpy as np
import pytest

from prismatic.meshes import fewer_triangles, merged_vertices


def sphere(rings: int) -> tuple[np.ndarray, np.ndarray]:
    """A sphere of 50 mm: vertices (V, 3) and triangles (F, 3)."""
    polar, round_ = np.meshgrid(np.linspace(0, np.pi, rings), np.linspace(0, 2 * np.pi, rings), indexing="ij")
    directions = [np.sin(polar) * np.cos(round_), np.sin(polar) * np.sin(round_), np.cos(polar)]
    number = np.arange(rings * rings).reshape(rings, rings)
    a, b, c, d = (part.ravel() for part in (number[:-1, :-1], number[1:, :-1], number[:-1, 1:], number[1:, 1:]))
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([b, d, c], 1)])
    return 0.05 * np.stack([direction.ravel() for direction in directions], 1), faces


@pytest.mark.parametrize("cell", [0.002, 0.008])
def test_what_is_left_lies_on_the_surface_and_covers_it(cell: float) -> None:
    vertices, faces = sphere(120)
    left, fewer = merged_vertices(vertices, faces, cell)
    assert len(left) == len(fewer) < len(faces) * (0.9 if cell == 0.002 else 0.1)
    corners = vertices[fewer]
    moved = np.linalg.norm(corners - vertices[faces[left]], axis=2)
    assert moved.max() <= cell * np.sqrt(3)  # each corner stays within its cube
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    assert areas.sum() == pytest.approx(4 * np.pi * 0.05**2, rel=0.1)
    assert (fewer != np.roll(fewer, 1, axis=1)).all()
    triples = np.sort(fewer, axis=1)
    assert len(np.unique(triples, axis=0)) > 0.99 * len(triples)


def test_the_model_is_whole_again_afterwards() -> None:
    vertices, faces = sphere(60)
    model = SimpleNamespace(
        geom_group=np.array([1, 0]),
        geom_type=np.array([7, 7]),
        geom_dataid=np.array([0, 0]),
        geom_bodyid=np.array([0, 0]),
        mesh_faceadr=np.array([0]),
        mesh_facenum=np.array([len(faces)]),
        mesh_vertadr=np.array([0]),
        mesh_vertnum=np.array([len(vertices)]),
        mesh_vert=vertices,
        mesh_face=faces.copy(),
        mesh_facenormal=np.arange(len(faces) * 3).reshape(-1, 3),
        mesh_facetexcoord=np.arange(len(faces) * 3).reshape(-1, 3),
        body=lambda number: SimpleNamespace(name="robot0_link0"),
    )
    before = {name: np.copy(value) for name, value in vars(model).items() if isinstance(value, np.ndarray)}
    with pytest.raises(KeyError), fewer_triangles(model):
        number = model.mesh_facenum[0]
        assert number < len(faces) / 4
        left = model.mesh_facenormal[:number, 0] // 3  # normals and texture coordinates go with their triangle
        np.testing.assert_array_equal(model.mesh_facetexcoord[:number], before["mesh_facetexcoord"][left])
        raise KeyError("an error while the renderer is made")
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(model, name), value)
