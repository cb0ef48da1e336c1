"""A policy without a model: its answer is a number made of everything that it was given, so a mix-up shows."""

import threading
import time
import zlib
from collections.abc import Hashable
from typing import Any

import numpy as np

from prismatic.errors import PolicyError
from prismatic.policy import Frames, Names, Policy, Rows, Texts


class FakePolicy(Policy):
    """delay: seconds a batch. batches: rows of each so far; streams: of each row so far. The instructions "explode" and "nan" break it."""

    def __init__(
        self, *, num_images: int = 2, num_actions_chunk: int = 1, uses_state: bool = False, delay: float = 0.0
    ) -> None:
        self.num_images, self.num_actions_chunk, self.uses_state = num_images, num_actions_chunk, uses_state
        self.delay, self.last_margins = delay, np.zeros(0)
        self.batches: list[int] = []
        self.streams: list[Hashable] = []
        self.gate = threading.Event()  # closed: batches wait
        self.gate.set()

    def batch_chunks(
        self, frames: Frames, instructions: Texts, wrists: Rows = None, states: Rows = None, *, episodes: Names = None
    ) -> np.ndarray:
        self.gate.wait()
        time.sleep(self.delay)
        self.batches.append(len(frames))
        self.streams.extend(episodes or [])
        if "explode" in instructions:
            raise ValueError("broken")
        if "nan" in instructions:
            raise PolicyError("the policy answered with NaN")
        rows = zip(frames, instructions, wrists or frames, states or [None] * len(frames), strict=True)
        return np.stack([self.answer(*row) for row in rows])

    def answer(
        self, frame: np.ndarray, instruction: str, wrist: np.ndarray | None = None, state: Any = None
    ) -> np.ndarray:
        """(K, 7) float32; gripper 0.75."""
        parts = [frame.tobytes(), instruction.encode()]
        parts.append(b"" if wrist is None or self.num_images < 2 else wrist.tobytes())
        parts.append(b"" if state is None else np.float32(state).tobytes())
        generator = np.random.default_rng([zlib.crc32(part) for part in parts])
        chunk = generator.uniform(-1, 1, (self.num_actions_chunk, 7)).astype(np.float32)
        chunk[:, 6] = 0.75
        return chunk

    def metadata(self) -> dict[str, Any]:
        return {
            "checkpoint": "fake",
            "unnorm_key": "libero_spatial_no_noops",
            "proprio_dim": 8 if self.uses_state else 0,
            "num_actions_chunk": self.num_actions_chunk,
            "gripper_dims": [6],
        }


def picture(seed: int, side: int = 32) -> np.ndarray:
    """(side, side, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
