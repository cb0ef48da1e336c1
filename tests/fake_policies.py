"""Policies for the fake simulator: they act on the frames' brightness alone."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.policy import Frames, Names, Policy, Rows, Texts


class BrightnessPolicy(Policy):
    """Some start states are too far from the goal for it: they fail. Each later action of a chunk is a little weaker.

    told: the instructions so far; calls: frames of each episode's name; check: called with each batch's frames. simulators, log: the first
    answer waits until so many have been built (FAKE_LOG), so that they play side by side.
    """

    def __init__(
        self,
        num_images: int = 1,
        num_actions_chunk: int = 1,
        uses_state: bool = False,
        *,
        check: Callable[[Sequence[Any]], None] = lambda frames: None,
        log: Path | None = None,
        simulators: int = 0,
    ) -> None:
        self.num_images, self.num_actions_chunk, self.uses_state = num_images, num_actions_chunk, uses_state
        self.last_margins = np.zeros(0)
        self.batch_sizes: list[int] = []
        self.told: set[str] = set()
        self.calls: dict[Any, int] = {}
        self.check, self.log, self.simulators = check, log, simulators

    def batch_chunks(
        self, frames: Frames, instructions: Texts, wrists: Rows = None, states: Rows = None, *, episodes: Names = None
    ) -> np.ndarray:
        assert (wrists is not None) == (self.num_images > 1)
        assert (states is not None) == self.uses_state
        while self.log and not self.batch_sizes and len(self.log.read_text().splitlines()) < self.simulators:
            time.sleep(0.02)
        self.check(frames)
        self.batch_sizes.append(len(frames))
        self.told.update(instructions)
        self.calls.update({episode: self.calls.get(episode, 0) + 1 for episode in episodes or ()})
        chunks = np.zeros((len(frames), self.num_actions_chunk, 7), np.float32)
        for row, frame in enumerate(frames):
            level = getattr(frame, "pixels", frame)[0, 0, 0]
            chunks[row, :, 0] = 0.5 + level / 510 - 0.01 * np.arange(self.num_actions_chunk)
        return chunks

    def metadata(self) -> dict[str, str]:
        return {"decode": "brightness"}


class RoundingPolicy(BrightnessPolicy):
    """As with rounding, the batch's size decides."""

    def batch_chunks(self, frames: Frames, *rest: Any, **named: Any) -> np.ndarray:
        time.sleep(0.01)  # so that others wait together
        chunks = super().batch_chunks(frames, *rest, **named)
        chunks[..., 0] += 1e-4 * len(frames)
        return chunks
