"""RLDS in the forms that people have: each is read, or refused by a sentence that names what is there and the flag that tells."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prismatic.data import rlds
from prismatic.data.frames import FrameCache
from prismatic.image import decode_jpeg, jpeg_round_trip
from tests import drawn_rlds
from tests.conftest import REPOSITORY
from tests.drawn_rlds import INSTRUCTION, LENGTHS, action, picture, state


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    done = subprocess.run(
        [sys.executable, "-m", "tests.drawn_rlds", str(folder)],
        cwd=REPOSITORY,
        env=os.environ | rlds.CHILD_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def steps(cache: FrameCache) -> list[int]:
    """The step of each frame; the episodes' order on disk is tfds' own."""
    assert sorted(np.bincount(cache.episode)) == sorted(LENGTHS)
    return cache.timestep.tolist()


USUAL = (
    *("png", "noformat", "raw", "array_record", "instruction_in_observation", "many_words", "float64", "dict_action"),
    *("told_action", "told_cameras", "one_camera", "no_state", "long_state", "gripper_one_open"),
)


@pytest.mark.parametrize("kind", USUAL)
def test_a_form_gives_the_same_as_the_usual_one(forms: Path, kind: str) -> None:
    cache = FrameCache(forms / kind)
    raw = np.load(cache.folder / "steps.npz")["action"]
    later = 9 if kind == "told_cameras" else 0
    for frame, t in enumerate(steps(cache)):
        pixels = decode_jpeg(cache.image_bytes(frame)).astype(int)
        loss = np.abs(pixels - jpeg_round_trip(picture(t + later)))
        assert loss.mean() < 3 if kind == "noformat" else loss.max() == 0
        assert cache.instruction(frame) == INSTRUCTION
        expected = action(t, gripper=(1.0, 0.0)) if kind == "gripper_one_open" else action(t)
        np.testing.assert_array_equal(raw[frame], expected)
        assert cache.actions[frame, 6] == (t <= 1)  # 1 open, whatever the data set's convention
        if kind == "no_state":
            assert cache.state is None
        else:
            assert cache.state is not None
            np.testing.assert_array_equal(cache.state[frame], state(t, 10 if kind == "long_state" else 8))
    assert cache.has_wrist == (kind in ("png", "told_cameras"))


def test_what_is_assumed_is_said(forms: Path) -> None:
    assumed = FrameCache(forms / "gripper_one_open").gripper
    assert assumed.convention == "one_open" and "--gripper" in assumed.evidence
    proved = FrameCache(forms / "png").gripper
    assert proved.convention == "minus_one_open" and "-1" in proved.evidence
    assert any("several instructions" in note for note in FrameCache(forms / "many_words").notes)
    assert "image: observation/webcam" in FrameCache(forms / "one_camera").notes


def test_latin_1_is_read(forms: Path) -> None:
    assert FrameCache(forms / "latin1").instruction(0) == "déplace le bol à gauche"


def test_two_arms(forms: Path) -> None:
    cache = FrameCache(forms / "two_arms")
    assert cache.actions.shape[1] == 14 and cache.gripper.dims == ()


def test_images_can_be_turned(forms: Path) -> None:
    cache = FrameCache(forms / "rotated")
    for frame, t in enumerate(steps(cache)):
        assert (decode_jpeg(cache.image_bytes(frame)) == jpeg_round_trip(picture(t)[::-1, ::-1])).all()


@pytest.mark.parametrize(
    ("kind", "there", "flag"),
    [
        ("strange_action", ("action/a", "action/b"), "--data_keys action="),
        ("other_cameras", ("observation/left", "observation/right"), "--data_keys image="),
        ("nan", ("NaN",), "repair"),
    ],
)
def test_what_is_refused_names_what_is_there(forms: Path, kind: str, there: tuple[str, ...], flag: str) -> None:
    sentence = (forms / f"{kind}.error").read_text()
    assert all(name in sentence for name in there) and flag in sentence


def test_every_kind_was_tried(forms: Path) -> None:
    made = {path.name for path in (forms / "sets").iterdir()} - {"downloads"}
    tried = {*USUAL, "latin1", "two_arms", "rotated", "strange_action", "other_cameras", "nan"}
    assert made == tried and drawn_rlds.LENGTHS.count(1) == 1  # one of the episodes has one step
