"""golden.py: the reference itself is as expected, another picture is not."""

import numpy as np
from PIL import Image

from prismatic.scene import golden


def test_the_reference_is_as_expected_and_a_darker_one_is_not() -> None:
    frame = np.asarray(Image.open(golden.GOLDEN_FRAME))
    found = golden.compare(frame, "osmesa")
    assert (found["differs_by"], found["as_expected"], len(found["sha256"])) == (0.0, True, 16)
    darker = golden.compare(frame - np.minimum(frame, 2), "osmesa")
    assert darker["as_expected"] is False and 1 < darker["differs_by"] <= 2
    assert darker["sha256"] != found["sha256"]
    assert golden.compare(frame - np.minimum(frame, 2), "egl")["as_expected"]  # drivers shade a little differently
