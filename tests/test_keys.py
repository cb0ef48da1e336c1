"""Fields by their usual names or told, and the gripper's convention from values, names or a flag."""

import numpy as np
import pytest

from prismatic.data.gripper import choose_gripper, detect_gripper
from prismatic.data.keys import find_keys, parse_data_keys
from prismatic.errors import ConfigError
from prismatic.normalize import Gripper, gripper_open_is_one

CAMERAS = ["observation.images.top", "observation.images.image2"]


def found(told: str = "", camera: list[str] = CAMERAS, vector: tuple[str, ...] = ("observation.state", "action")):
    return find_keys({"camera": camera, "vector": list(vector)}, parse_data_keys(told), "a set")


def test_usual_names_in_full_or_by_their_last_part() -> None:
    assert found() == (*CAMERAS, ("observation.state",), ("action",), None)
    assert found("image=image2,wrist=none,state=none") == (CAMERAS[1], None, (), ("action",), None)
    assert found(camera=["observation/webcam"]).image == "observation/webcam"  # the only one there is
    assert found("action=action+observation.state").action == ("action", "observation.state")


@pytest.mark.parametrize("text", ["image", "image=", "depth=x", "image=none", "=x", "image:x"])
def test_what_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--data_keys .* says nothing: write --data_keys image="):
        parse_data_keys(text)


def test_what_is_missing_is_named_with_what_is_there() -> None:
    with pytest.raises(ConfigError, match=r"image .*left_eye, right_eye.*--data_keys image="):
        found(camera=["left_eye", "right_eye"])
    with pytest.raises(ConfigError, match=r"action=torque: a set has 0 fields .*there are: observation.state, action"):
        found("action=torque")
    with pytest.raises(ConfigError, match="names 2 fields"):
        found("image=top+image2")
    with pytest.raises(ConfigError, match=r"action .*action/a, action/b.*--data_keys action="):
        found(vector=("action/a", "action/b"))


def columns(*grippers: float) -> np.ndarray:
    values = np.zeros((len(grippers), 7), dtype=np.float32)
    values[:, 6] = grippers
    return values


@pytest.mark.parametrize(
    ("values", "names", "dims", "convention"),
    [
        (columns(-1, 1, 0.5), (), (6,), "minus_one_open"),
        (columns(0, 1), (), (6,), "one_open"),
        (columns(-0.02, 1), (), (6,), "one_open"),  # noise below 0 proves nothing
        (columns(0, 80), (), (), "none"),  # degrees
        (columns(0, 0.04), (), (), "none"),  # metres
        (columns(0, 0), (), (6,), "one_open"),  # never opened
        (np.tile(columns(0, 1), (1, 2)), [*["left_arm"] * 6, "left_grip", *["right_arm"] * 6, "right_grip"], (6, 13), "one_open"),
        (columns(0, 1), [f"joint_{n}" for n in range(7)], (), "none"),
        (columns(0, 1), ["gripper", *"abcdef"], (0,), "one_open"),
        (np.tile(columns(-1, 1), (1, 2)), [*"abcdef", "left_gripper", *"ghijkl", "right_gripper"], (6, 13), "minus_one_open"),
        (np.tile(columns(-1, 1), (1, 2)), (), (), "none"),
        (np.zeros((2, 4)), (), (), "none"),
    ],
)  # fmt: skip
def test_the_convention_is_found(values: np.ndarray, names: list[str], dims: tuple[int, ...], convention: str) -> None:
    gripper = detect_gripper(values, names)
    assert (gripper.dims, gripper.convention) == (dims, convention) and gripper.evidence


@pytest.mark.parametrize(
    ("convention", "recorded"),
    [("minus_one_open", (-1, 1)), ("plus_one_open", (1, -1)), ("one_open", (1, 0)), ("zero_open", (0, 1))],
)
def test_each_convention_becomes_one_open(convention: str, recorded: tuple[float, float]) -> None:
    raw = columns(*recorded)
    chosen = choose_gripper(convention, detect_gripper(raw), 7)
    assert gripper_open_is_one(raw, chosen)[:, 6].tolist() == [1, 0]
    assert convention in ("minus_one_open", "plus_one_open") or "--gripper" in chosen.evidence


def test_a_command_that_only_starts_motions_is_refused_unless_something_else_is_told() -> None:
    relative = detect_gripper(np.concatenate([columns(0, 0), columns(-1, 0), columns(1, 0)]))
    with pytest.raises(ConfigError, match=r"relative \(-1 and 1 .* 67% .* are 0\).*--gripper none"):
        choose_gripper("auto", relative, 7)
    assert choose_gripper("none", relative, 7).dims == () and choose_gripper("plus_one_open", relative, 7).dims == (6,)
    assert detect_gripper(np.concatenate([columns(-1, 0.4), columns(1, -0.4)])).convention == "minus_one_open"


def test_a_convention_that_is_none_is_refused_and_auto_keeps_what_was_found() -> None:
    gripper = detect_gripper(columns(0, 1))
    assert choose_gripper("auto", gripper, 7) == gripper and choose_gripper("none", gripper, 7).dims == ()
    with pytest.raises(ConfigError, match=r"--gripper 'open'.*minus_one_open"):
        choose_gripper("open", gripper, 7)
    assert choose_gripper("one_open", Gripper((), "none"), 4).dims == (3,)
