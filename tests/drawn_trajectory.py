"""Trajectory of an episode for tests: a made-up scene of straight motions, changed at one point in each case."""

from typing import Any

import numpy as np

from prismatic.scene.trajectory import Goal, Part, Place, Trajectory

T = 120
CUP, JUG, PLATE = 0, 1, 2
ON_PLATE = Goal("on", "cup_1", "plate_1", Place("plate_1", outline=np.array([0.07, 0.07, 0.01]), room=np.full(3, 0.03)))
DRAWER = Part(name="chest_1_top_level", fixture="chest_1", hinge=False, span=0.17)
DOOR = Part(name="oven_1_door", fixture="oven_1", hinge=True, span=2.0)


def scene(**changes: Any) -> Trajectory:
    """A cup, a jug, a plate, a drawer and a door; the hand 50 cm away. It stands still, and nothing happens."""
    values: dict[str, Any] = {
        "goals": [ON_PLATE],
        "objects": ["cup_1", "jug_1", "plate_1"],
        "parts": [DRAWER, DOOR],
        "centre": np.zeros((3, 3)),
        "half": np.full((3, 3), 0.04),
        "hand": np.tile([0.0, 0.0, 0.5], (T + 1, 1)),
        "opening": np.full(T + 1, 0.08),
        "closing": np.zeros(T + 1, bool),
        "places": np.tile([[0.0, 0.0, 0.0], [0.3, 0.3, 0.0], [0.4, 0.0, 0.0]], (T + 1, 1, 1)),
        "upright": np.tile([0.0, 0.0, 1.0], (T + 1, 3, 1)),
        "touch": np.zeros((T + 1, 5, 3), bool),
        "values": np.zeros((T + 1, 2)),
        "part_gap": np.full((T + 1, 2), 0.5),
        "held": np.zeros((T + 1, 1), bool),
        "supports": [[]],
    } | changes
    values.setdefault("offset", (values["places"][:, CUP] - values["places"][:, PLATE])[:, None])
    return Trajectory(**values)


def hand_at(place: Any, start: int = 10) -> np.ndarray:
    """(T + 1, 3): it stays 50 cm above, then at a place but for a slow swing, which is no standing still."""
    hand = np.tile([0.0, 0.0, 0.5], (T + 1, 1))
    hand[start:] = place
    hand[:, 0] += 0.012 * np.sin(np.arange(T + 1) / 3)
    return hand


def grasp(thing: int, path: dict[int, Any], *, start: int = 20, stop: int = T + 1, rest: Any = None) -> Trajectory:
    """The hand takes a thing from `start` to `stop` through the places of `path` {step: (3,)}, then it lies at `rest`."""
    base = scene()
    places, touch, closing, opening = base.places, base.touch, base.closing, base.opening
    steps = np.arange(T + 1)
    known = {start: places[0, thing], **path}
    for axis in range(3):
        moved = np.interp(steps, list(known), [point[axis] for point in known.values()])
        places[start:stop, thing, axis] = moved[start:stop]
    places[stop:, thing] = places[0, thing] if rest is None else rest
    touch[start:stop, thing, :2] = closing[start:stop] = True
    opening[start - 5 : start] = np.linspace(0.08, 0.02, 5)
    opening[start:stop] = 0.02
    hand = places[:, thing] + np.where(steps < start - 5, 0.5, 0.0)[:, None]
    return scene(places=places, touch=touch, closing=closing, opening=opening, hand=hand)
