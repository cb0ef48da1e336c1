"""Does this machine draw what scores were made with? One scene, drawn here, against golden_frame.png.

The hash tells whether two runs drew the same pixels; the difference, whether a policy would notice.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN_FRAME = Path(__file__).with_name("golden_frame.png")  # libero_spatial, task 0, state 0, with osmesa
TOLERANCE = {"osmesa": 0.5, "egl": 3.0}  # mean |difference| of 255; drivers shade a little differently


def compare(frame: np.ndarray, renderer: str) -> dict[str, Any]:
    """frame: this machine's, (256, 256, 3) uint8 → its hash and its distance, in levels of 255."""
    from PIL import Image

    expected = np.asarray(Image.open(GOLDEN_FRAME))
    difference = float(np.abs(frame.astype(int) - expected).mean())
    limit = TOLERANCE.get(renderer, TOLERANCE["osmesa"])
    return {
        "sha256": hashlib.sha256(frame.tobytes()).hexdigest()[:16],
        "differs_by": round(difference, 3),
        "at_most": limit,
        "as_expected": difference <= limit,
    }
