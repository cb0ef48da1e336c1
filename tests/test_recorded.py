"""recorded.py: a data set's episodes played again, in the fake simulator; looking up LIBERO's HDF5 demonstrations; which starts match."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismatic import evaluation
from prismatic.data.frames import FrameCache
from prismatic.episodes import recorded
from prismatic.episodes.demonstration import Pushes, beginning
from prismatic.episodes.player import Play
from prismatic.episodes.result import read_rows
from prismatic.episodes.trials import Recording, Trial
from prismatic.errors import ConfigError
from prismatic.image import encode_jpeg
from prismatic.scene.suites import init_states, instruction, task_name
from prismatic.summary import crashed, sentences
from tests.drawn_cache import write_cache
from tests.drawn_demonstrations import write_libero_file
from tests.fake_simulator import GOAL, SIDE, FakeBenchmark

PUSH = 0.8  # of a recorded action, which moves the fake's point by 20 of it


def played(start: float, *, slip: int | None = None) -> dict[str, Any]:
    """What recording the fake simulator gives: pushed to the goal; at step `slip` something pushed it back unrecorded."""
    places = [start]
    while places[-1] < GOAL:
        back = 60.0 if slip is not None and len(places) == slip else 0.0
        places.append(places[-1] + 20 * PUSH - back)
    frames = [np.full((SIDE, SIDE, 3), int(np.clip(place, 0, 255)), np.uint8) for place in places[:-1]]
    action = np.zeros((len(frames), 7), np.float32)
    action[:, 0], action[:, 6] = PUSH, -1.0
    state = np.zeros((len(frames), 8), np.float32)
    state[:, 0] = np.array(places[:-1]) / 1000
    return {"images": [encode_jpeg(frame) for frame in frames], "action": action, "state": state}


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    """Four episodes of task 1 (which the fake starts at 10 x seed + 7) and one that says nothing of its beginning."""
    whole, moved, slipped, strange = played(87), played(87 + 40), played(87, slip=3), played(87)
    moved["state"][:, 0] -= 0.04  # the hand is where it was, the picture is not
    episodes = [
        episode | {"instruction": "push", "file_path": f"fake/task1/seed0/attempt{number}"}
        for number, episode in enumerate((whole, moved, slipped))
    ]
    return write_cache(tmp_path / "cache", [*episodes, strange | {"instruction": "push", "file_path": "somewhere"}])


def test_a_replay_follows_leaves_or_is_left_out(
    cache: FrameCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "beginning", lambda generator, perturbation: (8, None))
    demos, sentence = recorded.recorded_episodes(cache, "fake", task_ids=(), limit=9, from_hdf5=None)
    assert sentence == "drawn: the beginning of 3 of 4 episodes is known, 3 are replayed"
    with evaluation.RolloutFolder(tmp_path / "run", identity={"policy": "replay"}, record={}) as folder:
        summary = evaluation.evaluate(demos, folder, play=Play(policy="replay", benchmark=FakeBenchmark()))
    whole, moved, slipped = sorted(read_rows(tmp_path / "run"), key=lambda row: row.init_state)
    assert whole.replay and slipped.replay
    assert (whole.episode_id, whole.success) == ("fake/task1/demo0/seed0", True)
    assert whole.steps == whole.replay.recorded_steps == whole.replay.followed_steps
    assert whole.replay.file_path == "fake/task1/seed0/attempt0"
    assert (moved.success, moved.steps, moved.video) == (None, 0, None)
    assert moved.reason == "Left out: it does not begin as it was recorded."
    assert (moved.error or "").startswith("OtherStart: the hand is 0 mm off, the image 40")
    # without the push the point is ahead of its recording from there on
    assert (slipped.success, slipped.replay.followed_steps) == (True, 3)
    assert summary["replay"] == {"started_as_recorded": 2, "followed_to_the_end": 1, "left_out": 1}
    assert (summary["successes"], summary["errors"]) == (2, 1)
    assert crashed(summary) == 0  # so nobody is told that playing it again may help
    assert any(sentence.startswith("left out, ") and " 1; " in sentence for sentence in sentences(summary))


def started(*numbers: int, perturbation: float = 0.0) -> tuple[int, Pushes]:
    return beginning(np.random.default_rng(numbers), perturbation)


def recordings(trials: list[Trial]) -> list[Recording]:
    return [trial.recording for trial in trials if trial.recording]


def test_which_episodes(cache: FrameCache) -> None:
    demos, _ = recorded.recorded_episodes(cache, "fake", task_ids=(1,), limit=2, from_hdf5=None)
    assert [demo.init_state for demo in demos] == [0, 1]
    assert [found.seed for found in recordings(demos)] == [started(0, 1, attempt)[0] for attempt in (0, 1)]
    assert set(recordings(demos)[0].actions[:, 6]) == {1.0}  # the policy's convention
    with pytest.raises(ConfigError, match=r"no episode of other in data set drawn .*--from_hdf5 FOLDER"):
        recorded.recorded_episodes(cache, "other", task_ids=(), limit=9, from_hdf5=None)


def test_the_beginning_does_not_depend_on_the_pushes() -> None:
    seed, pushes = started(5, 2, 3, perturbation=0.7)
    assert seed == started(5, 2, 3)[0]
    generator = np.random.default_rng([5, 2, 3])  # as episodes of earlier collections drew them
    same = Pushes(generator, 0.7)
    assert seed == int(generator.integers(1_000_000, 2**31))
    assert all((pushes() == same()).all() for _ in range(50))


def test_liberos_own_demonstrations_are_found_by_their_actions(tmp_path: Path) -> None:
    suite, task = "libero_spatial", 3
    stored = init_states(suite, task)
    rng = np.random.default_rng(0)
    files = tmp_path / "files"
    demonstrations = []
    for number in range(3):
        actions = np.append(rng.normal(size=(12, 6)), np.where(np.arange(12) < 6, -1.0, 1.0)[:, None], axis=1)
        actions[4, :6] = 0.0  # a no-op, which no data set holds
        demonstrations.append((np.repeat(stored[number : number + 1], 12, axis=0), actions))
    write_libero_file(files / f"{task_name(suite, task)}_demo.hdf5", demonstrations)
    frame = [encode_jpeg(np.zeros((SIDE, SIDE, 3), np.uint8))] * 11
    words = {"instruction": instruction(suite, task), "file_path": "/somewhere/else.hdf5"}
    episodes = [
        {"images": frame, "action": np.delete(demonstrations[number][1], 4, axis=0), "state": np.zeros((11, 8))} | words
        for number in (2, 0)
    ]
    stranger = episodes[0] | {"action": np.append(rng.normal(size=(11, 6)), np.ones((11, 1)), axis=1)}
    found, sentence = recorded.recorded_episodes(
        write_cache(tmp_path / "cache", [*episodes, stranger]), suite, task_ids=(), limit=9, from_hdf5=files
    )
    assert sentence == "drawn: the beginning of 2 of 3 episodes is known, 2 are replayed"
    assert [(demo.task_id, demo.init_state) for demo in found] == [(task, 0), (task, 1)]
    for recording, number in zip(recordings(found), (2, 0), strict=True):
        assert recording.seed is None
        np.testing.assert_array_equal(recording.start, stored[number])


def test_block_difference_sees_a_moved_thing_and_no_grain() -> None:
    rng = np.random.default_rng(0)
    picture = np.full((64, 64, 3), 120, np.uint8)
    grain = (picture + rng.integers(-20, 21, picture.shape)).astype(np.uint8)
    assert recorded.block_difference(picture, grain) < 6
    moved = picture.copy()
    moved[20:30, 20:30] = 20
    assert recorded.block_difference(picture, moved) > recorded.START_IMAGE
    assert recorded.block_difference(picture, picture[:32]) == 255.0
