"""Which dimensions of an action are grippers, and how a data set writes open and closed, told by names and by recorded values.

Nothing is inverted on suspicion: values down to -1 are taken as -1 open, +1 close (LIBERO's own); values within 0 … 1, or noise below 0, as
1 open, 0 closed, as published conversions have it; any other range is no gripper command and is normalised like the rest. Mostly 0 beside -1 and
+1 is a command that starts a motion and is then let go (Open X's fractal20220817_data): as a position 0 would be "half open", so it is refused.
"""

from collections.abc import Sequence

import numpy as np

from prismatic.errors import ConfigError
from prismatic.normalize import GRIPPER_CONVENTIONS, Gripper

ACTION_DIM_OF_ONE_ARM = 7  # position 3, rotation 3, gripper: the last is the gripper also where no names say so
LARGEST_WIDTH = 0.5  # what is 0 or more and never reaches this is an opening in metres, no command from 0 to 1
SLACK = 1e-3  # by which a command may leave its range: rounding, not another convention
PROOF = -0.5  # a smallest value between this and zero is noise of a sensor, not an order to open
FLAG = "--gripper"
RELATIVE = "relative"  # found, but no convention that can be learnt
AT_REST = 1e-2  # a command nearer to zero than this starts no motion


def gripper_dims(action_dim: int, names: Sequence[str] = ()) -> tuple[int, ...]:
    """Dimensions whose name holds "grip"; without any the last of 7 unless it is a joint's, and none of another width."""
    names = names if len(names) == action_dim else ()
    named = tuple(place for place, name in enumerate(names) if "grip" in name.lower())
    if named or action_dim != ACTION_DIM_OF_ONE_ARM or (names and "joint" in names[-1].lower()):
        return named
    return (ACTION_DIM_OF_ONE_ARM - 1,)


def detect_gripper(actions: np.ndarray, names: Sequence[str] = ()) -> Gripper:
    """The convention that recorded actions (N, D), N ≥ 1, show."""
    dims = gripper_dims(actions.shape[1], names)
    if not dims:
        text = f"no dimension of these {actions.shape[1]} is known as a gripper: all are normalised"
        return Gripper((), "none", text)
    low, high = float(actions[:, dims].min()), float(actions[:, dims].max())
    width = low >= -SLACK and SLACK < high < LARGEST_WIDTH
    if width or low < -1 - SLACK or high > 1 + SLACK:
        said = f"values from {low:.3g} to {high:.3g} are no gripper command"
        return Gripper((), "none", f"{said}: they are normalised like the other dimensions")
    at_rest = float((np.abs(actions[:, dims]) < AT_REST).mean())
    if low < PROOF and high > -PROOF and at_rest > 0.5:
        return Gripper(dims, RELATIVE, f"{low:.3g} and {high:.3g} start a motion and {at_rest:.0%} of the values are 0")
    if low < PROOF:
        text = f"-1 open, +1 close assumed, as its smallest value is {low:.3g}; if not, give {FLAG} plus_one_open"
        return Gripper(dims, "minus_one_open", text)
    below = "no value is below 0" if low >= 0 else f"its smallest value, {low:.3g}, is nearer to 0 than to -1"
    return Gripper(dims, "one_open", f"1 open, 0 closed assumed, as {below}; if not, give {FLAG} zero_open")


def choose_gripper(told: str, found: Gripper, action_dim: int) -> Gripper:
    """What was found, unless a convention was told ("auto" is none). ConfigError for one that can't be."""
    if told == "auto" and found.convention == RELATIVE:
        raise ConfigError(
            f"the gripper's command is relative ({found.evidence}), and as a position 0 would be read as open: record what it holds, 0 closed or "
            f"1 open, at every step, or give {FLAG} none to learn the numbers as they are"
        )
    if told == "auto":
        return found
    if told == "none":
        return Gripper((), "none", f"no gripper, as {FLAG} says")
    if told not in GRIPPER_CONVENTIONS:
        raise ConfigError(f"{FLAG} {told!r} is no convention: give auto, none, {', '.join(GRIPPER_CONVENTIONS)}")
    return Gripper(found.dims or (action_dim - 1,), told, f"{GRIPPER_CONVENTIONS[told]}, as {FLAG} says")
