"""What a client asks of a policy, checked: frames, a sentence, the robot's state. Every dialect reads its messages into this.

A RequestError is the client's to mend: one sentence that names the field, and an HTTP status. Nothing here knows the model.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prismatic.observation import Observation

LARGEST = float(np.finfo(np.float32).max)
SMALLEST_SIDE, LARGEST_SIDE = 8, 4096  # pixels; a strip of a million would make resampling slow


class RequestError(Exception):
    """A request that can't be answered. status: as in HTTP."""

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a client may ask of the server."""

    body: int = 16 * 2**20  # bytes of a request or message
    pixels: int = 2**20  # of an image
    text: int = 1000  # characters of an instruction
    state: int = 64  # numbers of a state
    connections: int = 128
    queue: int = 256  # requests that wait
    read_seconds: float = 30.0  # from a request's first byte to its last


def read_observation(
    message: Mapping[str, Any],
    limits: Limits,
    *,
    image: str = "image",
    wrist: str = "wrist_image",
    instruction: str = "instruction",
    state: str = "state",
    stream: Hashable = None,
) -> Observation:
    """Check a message's fields, which the client calls so; None counts as absent."""
    key = message.get("unnorm_key")
    if key is not None and not isinstance(key, str):
        raise RequestError("unnorm_key must be a string")
    return Observation(
        frame=_image(message.get(image), image, limits),
        instruction=_text(message.get(instruction), instruction, limits),
        wrist=None if message.get(wrist) is None else _image(message[wrist], wrist, limits),
        state=None if message.get(state) is None else _state(message[state], state, limits),
        unnorm_key=key,
        stream=stream,
    )


def check_size(height: int, width: int, name: str, limits: Limits) -> None:
    """RequestError for an image that is too large, or too small to be one. Called before an image is decoded."""
    if not (min(height, width) >= SMALLEST_SIDE and max(height, width) <= LARGEST_SIDE):
        raise RequestError(f"{name} is {height} x {width}: its sides must be {SMALLEST_SIDE} to {LARGEST_SIDE} pixels")
    if height * width > limits.pixels:
        raise RequestError(f"{name} has {height * width:,} pixels, of at most {limits.pixels:,}: send it smaller", 413)


def _image(value: Any, name: str, limits: Limits) -> np.ndarray:
    if value is None:
        raise RequestError(f"{name} is missing: send an image (H, W, 3) uint8")
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
        found = f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise RequestError(f"{name} must be an array (H, W, 3) of uint8, it is {found}")
    check_size(value.shape[0], value.shape[1], name, limits)
    return value


def _text(value: Any, name: str, limits: Limits) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{name} must be a sentence that says what to do")
    if len(value) > limits.text:
        raise RequestError(f"{name} has {len(value):,} characters, of at most {limits.text:,}", 413)
    return value


def _state(value: Any, name: str, limits: Limits) -> np.ndarray:
    numbers = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(numbers, list) or not 0 < len(numbers) <= limits.state or {*map(type, numbers)} - {int, float}:
        raise RequestError(f"{name} must be a flat list of at most {limits.state} numbers")
    if not all(abs(n) <= LARGEST for n in numbers):
        raise RequestError(f"{name} holds NaN, infinity or a number beyond float32")
    return np.array(numbers, np.float32)
