"""Actions and robot states between a data set's own units and [-1, 1]; numpy only.

The gripper arrives as the data set writes it and is 1 open, 0 close from here on; its mask is False, so it is
not scaled. Surprising: quantiles are float64 sums of float32 differences, and the denominator
is formed in float64 before it becomes float32. Only so are the numbers bit-equal with the original's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ACTION_DIMENSIONS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
GRIPPER_CONVENTIONS = {  # how a data set writes a gripper's command
    "minus_one_open": "-1 open, +1 close",  # LIBERO's own
    "plus_one_open": "+1 open, -1 close",
    "one_open": "1 open, 0 closed",
    "zero_open": "0 open, 1 closed",
}
SMALLEST_RANGE = 1e-8  # added to q99 - q01, in the data set's units: a constant dimension would divide by zero


@dataclass(frozen=True)
class Gripper:
    """The grippers of a data set's actions."""

    dims: tuple[int, ...]  # which numbers of an action; none where there is no gripper
    convention: str  # how they were recorded: a key of GRIPPER_CONVENTIONS, "none", or "relative"
    evidence: str = ""  # a sentence: how this was found


LIBERO_GRIPPER = Gripper((-1,), "minus_one_open")


def gripper_open_is_one(actions: np.ndarray, gripper: Gripper = LIBERO_GRIPPER) -> np.ndarray:
    """Recorded actions (..., D) as float32, a copy, each gripper as 1 open … 0 close."""
    actions = np.array(actions, dtype=np.float32)
    for dim in gripper.dims:
        command = -actions[..., dim] if gripper.convention == "plus_one_open" else actions[..., dim]
        command = np.clip(command, 0, 1)
        actions[..., dim] = command if gripper.convention == "one_open" else 1 - command
    return actions


def _columns(values: np.ndarray) -> dict[str, list[float]]:
    # An *array* of float64 as the quantile keeps numpy 2 from rounding the result to the data's float32.
    return {
        "mean": values.mean(0).tolist(),
        "std": values.std(0).tolist(),
        "max": values.max(0).tolist(),
        "min": values.min(0).tolist(),
        "q01": np.quantile(values, np.array(0.01), axis=0).tolist(),
        "q99": np.quantile(values, np.array(0.99), axis=0).tolist(),
    }


def action_statistics(
    actions: np.ndarray, states: np.ndarray | None, num_trajectories: int, gripper_dims: Sequence[int] = (-1,)
) -> dict[str, Any]:
    """A data set's entry in dataset_statistics.json, JSON-ready, in the original's order of keys.

    `actions`: (N, D) float32 of *all* episodes after `gripper_open_is_one`, N ≥ 1. `states`: (N, K) float32,
    or None where the model reads no proprioception: that part is D zeros then, as in OpenVLA's own files.
    gripper_dims: what the mask leaves as it is.
    """
    proprio = np.zeros_like(actions) if states is None else states
    mask = [True] * actions.shape[1]
    for dim in gripper_dims:
        mask[dim] = False
    return {
        "action": _columns(actions) | {"mask": mask},
        "proprio": _columns(proprio),
        "num_transitions": len(actions),
        "num_trajectories": num_trajectories,
    }


def _mask(stats: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(stats.get("mask", np.ones(len(stats["q01"]), dtype=bool)))


def gripper_dims(stats: Mapping[str, Any]) -> list[int]:
    """Which numbers of an action are grippers: those that the mask leaves unscaled. Without a mask (foreign files), of seven the last."""
    scaled = stats.get("mask", [True] * 6 + [False] if len(stats["q01"]) == 7 else [])
    return [dim for dim, is_scaled in enumerate(scaled) if not is_scaled]


def normalize(actions: np.ndarray, stats: Mapping[str, Any]) -> np.ndarray:
    """(..., D) in the data set's units → float32, in [-1, 1] where the mask is True.

    `stats` is the "action" part of an entry. q01 becomes -1 and q99 becomes +1; a dimension that never
    changes in the data becomes 0, even where the mask is False.
    """
    actions = np.asarray(actions, dtype=np.float32)
    low, high = np.asarray(stats["q01"], dtype=np.float64), np.asarray(stats["q99"], dtype=np.float64)
    span = (high - low + SMALLEST_RANGE).astype(np.float32)
    scaled = np.clip(2 * (actions - low.astype(np.float32)) / span - 1, -1, 1)
    constant = np.asarray(stats["min"]) == np.asarray(stats["max"])
    return np.where(constant, np.float32(0), np.where(_mask(stats), scaled, actions))


def unnormalize(normalized: np.ndarray, stats: Mapping[str, Any], *, smallest_range: float = 0.0) -> np.ndarray:
    """(..., D) in [-1, 1] → float64 in the data set's units; `stats` as above, no mask means all True.

    smallest_range: SMALLEST_RANGE for OpenVLA-OFT, which adds it here too; OpenVLA does not.
    """
    normalized = np.asarray(normalized, dtype=np.float64)
    low, high = np.asarray(stats["q01"], dtype=np.float64), np.asarray(stats["q99"], dtype=np.float64)
    return np.where(_mask(stats), 0.5 * (normalized + 1) * (high - low + smallest_range) + low, normalized)


def normalize_state(states: np.ndarray, stats: Mapping[str, Any]) -> np.ndarray:
    """Robot states (..., D) in the data set's units → float64 in [-1, 1]; `stats` is the "proprio" part of an entry, which has no mask.

    A dimension that never changes in the data becomes 0, when learning and when acting: the original's acting code gives -1.
    """
    low, high = np.asarray(stats["q01"], dtype=np.float64), np.asarray(stats["q99"], dtype=np.float64)
    scaled = np.clip(2 * (np.asarray(states, dtype=np.float64) - low) / (high - low + SMALLEST_RANGE) - 1, -1, 1)
    return np.where(np.asarray(stats["min"]) == np.asarray(stats["max"]), 0.0, scaled)
