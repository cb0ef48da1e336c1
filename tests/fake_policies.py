"""Policies for the fake simulator: they act on the frames' brightness alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from prismatic.policy import Policy

CLOSE_CALLS = 37  # a frame's level that is a multiple of it is a close call for CloseCallPolicy


class BrightnessPolicy(Policy):
    """Some start states are too far from the goal for it: they fail. Each later action of a chunk is a little weaker."""

    def __init__(self, num_images: int = 1, num_actions_chunk: int = 1, uses_state: bool = False) -> None:
        self.num_images, self.num_actions_chunk, self.uses_state = num_images, num_actions_chunk, uses_state
        self.batch_sizes: list[int] = []
        self.last_margins = np.zeros(0)

    def batch_chunks(
        self,
        frames: Sequence[Any],
        instructions: Sequence[str],
        wrists: Sequence[Any] | None = None,
        states: Sequence[np.ndarray] | None = None,
        *,
        episodes: Sequence[Any] | None = None,
    ) -> np.ndarray:
        assert (wrists is not None) == (self.num_images > 1)
        assert (states is not None) == self.uses_state
        self.batch_sizes.append(len(frames))
        self.last_margins = np.full(len(frames), np.inf)
        chunks = np.zeros((len(frames), self.num_actions_chunk, 7), np.float32)
        for row, frame in enumerate(frames):
            chunks[row, :, 0] = 0.5 + frame[0, 0, 0] / 510 - 0.01 * np.arange(self.num_actions_chunk)
        return chunks

    def metadata(self) -> dict[str, str]:
        return {"decode": "brightness"}


class CloseCallPolicy(BrightnessPolicy):
    """Two actions that are equally good at some frames: there, as with rounding, the batch size decides, and it says so."""

    def batch_chunks(self, frames: Sequence[Any], *rest: Any, **named: Any) -> np.ndarray:
        chunks = super().batch_chunks(frames, *rest, **named)
        places = np.array([float(frame[0, 0, 0]) for frame in frames])
        close = places % CLOSE_CALLS == 0
        self.last_margins = np.where(close, 1e-6, 1.0)
        chunks[:] = 0
        chunks[:, 0, 0] = np.where(close & (len(frames) > 1), 0.65, 0.55)
        return chunks
