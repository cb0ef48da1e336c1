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
from tests.conftest import REPOSITORY
from tests.drawn_rlds import INSTRUCTION, LENGTHS, TWO_ARMS, action, picture, state


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


USUAL = (
    *("png", "noformat", "raw", "array_record", "instruction_in_observation", "many_words", "latin1", "float64"),
    *("dict_action", "told", "long_state", "gripper_one_open", "rotated"),
)


@pytest.mark.parametrize("kind", USUAL)
def test_a_form_gives_the_same_as_the_usual_one(forms: Path, kind: str) -> None:
    cache = FrameCache(forms / kind)
    raw = np.load(cache.folder / "steps.npz")["action"]
    assert cache.state is not None
    assert sorted(np.bincount(cache.episode)) == sorted(LENGTHS)  # their order on disk is tfds' own
    for frame, t in enumerate(cache.timestep.tolist()):
        loss = np.abs(decode_jpeg(cache.image_bytes(frame)).astype(int) - jpeg_round_trip(picture(t)))
        assert loss.mean() < 3 if kind == "noformat" else loss.max() == 0
        assert cache.instruction(frame) == ("déplace le bol à gauche" if kind == "latin1" else INSTRUCTION)
        expected = action(t, gripper=(1.0, 0.0)) if kind == "gripper_one_open" else action(t)
        np.testing.assert_array_equal(raw[frame], expected)
        assert cache.actions[frame, 6] == (t <= 1)  # 1 open, whatever the data set's convention
        np.testing.assert_array_equal(cache.state[frame], state(t, 10 if kind == "long_state" else 8))
    assert cache.has_wrist == (kind in ("png", "told"))


def test_what_is_assumed_is_said(forms: Path) -> None:
    assumed, proved = (FrameCache(forms / kind).gripper for kind in ("gripper_one_open", "png"))
    assert assumed.convention == "one_open" and "--gripper" in assumed.evidence
    assert proved.convention == "minus_one_open" and "-1" in proved.evidence
    assert any("several instructions" in note for note in FrameCache(forms / "many_words").notes)


def test_no_state_no_wrist_and_a_split_for_validation(forms: Path) -> None:
    lean, arms = (FrameCache(forms / kind) for kind in ("lean", TWO_ARMS))
    for cache, episodes in ((lean, 2 * len(LENGTHS)), (arms, len(LENGTHS))):
        assert cache.state is None and not cache.has_wrist and len(cache.file_paths) == episodes
    assert {*lean.episode[lean.train_indices()]} == {0, 1, 2}
    assert {*lean.episode[lean.validation_indices()]} == {3, 4, 5}
    assert arms.actions.shape == (sum(LENGTHS), 14) and arms.gripper.dims == ()
    assert arms.statistics["action"]["mask"] == [True] * 14


def test_a_split_named_validation_one_that_is_not_used_and_an_episode_without_steps(forms: Path) -> None:
    cache = FrameCache(forms / "splits")
    assert len(cache.file_paths) == 1 + 2 * len(LENGTHS) and any(
        "splits test are not used" in note for note in cache.notes
    )
    assert sorted(np.bincount(cache.episode)) == sorted((0, *LENGTHS, *LENGTHS))
    assert {*cache.episode[cache.validation_indices()]} == {4, 5, 6}


def test_of_val_and_validation_the_first_is_held_out_and_the_other_named(forms: Path) -> None:
    cache = FrameCache(forms / "val_and_validation")
    assert sorted(np.bincount(cache.episode)) == sorted((*LENGTHS, *LENGTHS[1:]))
    assert {*cache.episode[cache.validation_indices()]} == {3, 4}
    assert any("splits validation are not used" in note for note in cache.notes)


def test_only_a_cache_with_a_split_named_validation_is_another_than_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rlds, "cached", lambda cache_dir, name, identity, fill: identity)
    for split, more in (("val", []), ("validation", ["validation"])):
        source = tmp_path / split / "1.0.0"
        source.mkdir(parents=True)
        (source / f"drawn-{split}.tfrecord-00000-of-00001").touch()
        assert rlds.build_cache(source, tmp_path)[1:] == [[], False, *more]  # pyright: ignore[reportIndexIssue]


def test_what_is_refused_names_what_is_there(forms: Path) -> None:
    sentence = (forms / "other_cameras.error").read_text()
    assert all(part in sentence for part in ("observation/left", "observation/right", "--data_keys image="))
    assert [path.name for path in forms.glob("*.error")] == ["other_cameras.error"]
