"""Small demonstrations for tests: drawn pictures, random numbers, known words."""

from typing import Any

import numpy as np

from prismatic.image import encode_jpeg

SILENT_EPISODE = 3  # the one without an instruction


def drawn_jpeg(*numbers: int) -> bytes:
    """A picture of its own for each tuple of numbers."""
    frame = np.zeros((256, 256, 3), dtype=np.uint8)
    for place, number in enumerate(numbers):
        frame[60 * place : 60 * place + 50, 5 + 20 * number : 25 + 20 * number] = (250, 40 * place, 90)
    return encode_jpeg(frame)


def drawn_episode(number: int) -> dict[str, Any]:
    steps = 2 + number
    rng = np.random.default_rng(number)
    action = rng.normal(size=(steps, 7)).astype(np.float32)
    action[:, 6] = np.where(np.arange(steps) % 2, 1, -1)
    return {
        "images": [drawn_jpeg(number, t, 0) for t in range(steps)],
        "wrist_images": [drawn_jpeg(number, t, 1) for t in range(steps)],
        "state": rng.normal(size=(steps, 8)).astype(np.float32),
        "joint_state": rng.normal(size=(steps, 7)).astype(np.float32),
        "action": action,
        "instruction": "" if number == SILENT_EPISODE else f"put block {number} on the plate",
        "file_path": f"demo_{number}",
    }
