"""What a stranger's code hands to a policy: images of PIL and RGBA are simply taken, anything else that is no frame is one sentence."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from prismatic.errors import ConfigError
from prismatic.image import PreparedImage

WANTED = "a frame is (H, W, 3) uint8, RGB, upright"
SMALLEST, LARGEST = 8, 8192  # pixels a side
LONGEST = 100_000  # letters; the model reads 2,048 tokens

DAMAGED = "the policy answered with NaN or infinity: its weights or statistics are damaged"


class InputError(ConfigError):
    """What was given to a policy is nothing that it can read: the caller's to mend, not the machine's."""


def as_frame(given: Any, name: str) -> np.ndarray:
    """(H, W, 3) uint8 of a frame, a PIL image, or either with an alpha channel. ConfigError that says what was given and what is wanted."""
    if hasattr(given, "convert") and hasattr(given, "getbands"):  # a PIL image
        if str(given.mode).startswith(("F", "I")):  # more than 8 bits: converting would make it black or white
            raise InputError(f"{name} is an image of mode {given.mode}, but {WANTED}")
        try:
            given = np.asarray(given.convert("RGB"))
        except (OSError, ValueError) as error:
            raise InputError(f"{name} is an image that can't be read ({error}): give a whole one") from None
    if not isinstance(given, np.ndarray):
        hint = ": give .permute(1, 2, 0).cpu().numpy()" if hasattr(given, "detach") else ""
        raise InputError(f"{name} is of type {type(given).__name__}, but {WANTED}, as a numpy array{hint}")
    if given.dtype != np.uint8:
        raise InputError(f"{name} has dtype {given.dtype}, but {WANTED}: give values from 0 to 255 as uint8")
    if given.ndim == 3 and given.shape[2] == 4:
        given = np.ascontiguousarray(given[:, :, :3])
    if given.ndim != 3 or given.shape[2] != 3 or not all(SMALLEST <= side <= LARGEST for side in given.shape[:2]):
        channels_first = ": give np.moveaxis(frame, 0, 2)" if given.ndim == 3 and given.shape[0] in (3, 4) else ""
        raise InputError(f"{name} has shape {given.shape}, but {WANTED}{channels_first}")
    return given


def as_frames(given: Any, name: str) -> list[Any]:
    """As as_frame, of a sequence or an array (B, H, W, 3). What an ImagePath prepared beside the camera stays as it is."""
    return [
        frame if isinstance(frame, PreparedImage) else as_frame(frame, f"{name}[{number}]")
        for number, frame in enumerate(_sequence(given, name))
    ]


def as_states(given: Any, name: str) -> list[np.ndarray] | None:
    """B rows (S,) float64, a robot state a frame; None stays None. ConfigError where they are none, or not finite."""
    if given is None:
        return None
    try:
        states = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name} are no rows of numbers of one length: give (B, S), a robot state a frame") from None
    if states.ndim != 2:
        raise InputError(f"{name} have shape {states.shape}: give (B, S), a robot state a frame")
    if not np.isfinite(states).all():
        raise InputError(f"{name} hold NaN or infinity: give finite numbers")
    return [*states]


def check_batch(instructions: Any, **others: Any) -> None:
    """ConfigError unless the batch has a row and everything in it as many as there are instructions, which are text that can be encoded."""
    rows = len(_sequence(instructions, "instructions"))
    if not rows:
        raise InputError("the batch is empty: give at least one frame and its instruction")
    for name, given in others.items():
        if given is not None and len(_sequence(given, name)) != rows:
            raise InputError(f"there are {len(given)} {name} but {rows} instructions: give as many of each")
    for name in others.get("episodes") or ():
        if not isinstance(name, Hashable):
            raise InputError(f"an episode's name is of type {type(name).__name__}: give a text, or None for none")
    for number, text in enumerate(instructions):
        if not isinstance(text, str):
            raise InputError(f"instructions[{number}] is of type {type(text).__name__}: give a text")
        if len(text) > LONGEST:
            raise InputError(f"instructions[{number}] has {len(text):,} letters: shorten it")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(
                f"instructions[{number}] {text!r:.60} holds half a character (a surrogate): give valid Unicode"
            )


def _sequence(given: Any, name: str) -> Sequence[Any]:
    if isinstance(given, str | bytes) or not hasattr(given, "__len__") or not hasattr(given, "__getitem__"):
        raise InputError(f"{name} is of type {type(given).__name__}: give a list, one a row of the batch")
    return given
