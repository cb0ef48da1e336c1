"""A policy called by a stranger's code: what can be taken is, the rest is one sentence that says what was given and what is wanted."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prismatic.errors import ConfigError
from prismatic.image import PreparedImage
from prismatic.policy_inputs import as_frames, as_states, check_batch

FRAME = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)


def test_images_are_taken() -> None:
    """The server, and a simulator's process, hand images over that an ImagePath has prepared: they stay as they are."""
    opaque = np.dstack([FRAME, np.full(FRAME.shape[:2], 255, np.uint8)])
    prepared = PreparedImage(np.zeros((8, 8, 3), np.uint8))
    *frames, same = as_frames(
        [FRAME, Image.fromarray(FRAME), Image.fromarray(FRAME).convert("RGBA"), opaque, prepared], "frames"
    )
    np.testing.assert_array_equal(frames, [FRAME] * 4)
    assert same is prepared
    np.testing.assert_array_equal(as_frames(np.stack([FRAME] * 2), "frames"), [FRAME] * 2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (FRAME / 255, "float64"), (FRAME > 3, "bool"), (FRAME[:, :, :1], "(32, 40, 1)"), (FRAME[:, :, 0], "(32, 40)"),
        (FRAME.transpose(2, 0, 1), "moveaxis"), (FRAME[:0], "(0, 40, 3)"), (FRAME[None], "(1, 32, 40, 3)"), (np.array(3, np.uint8), "()"),
        (Image.fromarray(np.ones((32, 40), np.float32)), "mode F"),
        (torch.from_numpy(FRAME), "Tensor"), (None, "NoneType"), ("frame.png", "str"), ([[1, 2], [3]], "list"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_no_frame_is_one_sentence(given: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        as_frames([given], "frames")
    assert says in str(error.value) and "uint8" in str(error.value) and "\n" not in str(error.value)


def test_an_image_of_pil_that_is_cut_off_is_one_sentence() -> None:
    whole = io.BytesIO()
    Image.fromarray(np.tile(FRAME, (9, 9, 1))).save(whole, format="PNG")
    with pytest.raises(ConfigError, match=r"frames\[0\] is an image that can't be read"):
        as_frames([Image.open(io.BytesIO(whole.getvalue()[:-60]))], "frames")


@pytest.mark.parametrize(
    ("instructions", "others"),
    [
        ([], {"frames": []}), (["a"], {"frames": [FRAME, FRAME]}), (["a", "b"], {"frames": [FRAME]}), ("a", {"frames": [FRAME]}),
        (["a"], {"frames": None, "wrists": []}), ([3], {}), ([None], {}), (["a\ud800"], {}), (None, {}), (["a"], {"states": 3}),
        (["a"], {"episodes": [["a list"]]}), (["x" * 100_001], {}),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_fit_is_one_sentence(instructions: Any, others: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        check_batch(instructions, **others)
    assert "\n" not in str(error.value) and (str(error.value).isprintable())


@pytest.mark.parametrize(
    "given",
    [
        np.zeros(8),
        np.zeros((1, 1, 8)),
        [[0.0] * 8, [0.0] * 7],
        [["a"] * 8],
        [[None] * 8],
        [[float("nan")] * 8],
        [[10**400] * 8],
    ],
    ids=str,
)
def test_states_that_are_no_rows_of_numbers_are_one_sentence(given: Any) -> None:
    with pytest.raises(ConfigError, match="states") as error:
        as_states(given, "states")
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(as_states(torch.ones(2, 8), "states"), np.ones((2, 8)))


def test_a_batch_is_taken() -> None:
    check_batch(["把黑碗放到盘子上", ""], frames=[FRAME, FRAME], wrists=None, states=np.zeros((2, 8)))
