"""RLDS written and read back, and what is said about damaged folders. TensorFlow's few starts are shared."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from prismatic.data import rlds
from prismatic.data.frames import FrameCache
from prismatic.errors import ConfigError
from tests.drawn_episodes import drawn_episode

NAME = "drawn_set"
EPISODES = 5


@pytest.fixture(scope="session")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    for number in range(EPISODES):
        rlds.stage_episode(folder / f"episode_{number}.npz", **drawn_episode(number))
    return folder


@pytest.fixture(scope="session")
def dataset(staged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rlds.write_dataset(staged, tmp_path_factory.mktemp("rlds"), NAME)


@pytest.fixture(scope="session")
def cache(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> FrameCache:
    return FrameCache(rlds.build_cache(dataset, tmp_path_factory.mktemp("cache")))


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """The drawn data set, to be damaged."""
    return Path(shutil.copytree(dataset, tmp_path / "root" / NAME / "1.0.0"))


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(doing: str, *arguments: object) -> None:
        raise AssertionError(f"a process was started for {doing}")

    monkeypatch.setattr(rlds, "_in_child", refuse)


def reference_name(reference: Path) -> str:
    return json.loads((reference / "rlds_pipeline.json").read_text())["dataset_name"]


def drop_features(version: Path, *fields: str) -> None:
    path = version / "features.json"
    content = json.loads(path.read_text())
    steps = content["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    observation = steps["observation"]["featuresDict"]["features"]
    for field in fields:
        (steps if field in steps else observation).pop(field)
    path.write_text(json.dumps(content))


# Writing


def test_written_folder_has_the_plain_layout(dataset):
    assert dataset.parts[-2:] == (NAME, "1.0.0")
    tfrecord = f"{NAME}-train.tfrecord-00000-of-00001"
    assert {path.name for path in dataset.iterdir()} == {
        "dataset_info.json",
        "features.json",
        tfrecord,
        rlds.STAGED_NOTE,
    }
    assert [path.name for path in dataset.parent.iterdir()] == ["1.0.0"]
    info = json.loads((dataset / "dataset_info.json").read_text())
    (split,) = info["splits"]
    assert (info["name"], info["version"], info["fileFormat"]) == (NAME, "1.0.0", "tfrecord")
    assert (split["name"], split["shardLengths"]) == ("train", [str(EPISODES)])


def test_written_json_equals_the_references(dataset, reference):
    theirs = rlds.find_dataset(reference / "rlds", reference_name(reference))

    def both(file: str) -> list[dict]:
        return [json.loads((folder / file).read_text()) for folder in (dataset, theirs)]

    features, their_features = both("features.json")
    assert features == their_features
    info, their_info = both("dataset_info.json")
    for content in (info, their_info):
        for key in ("name", "releaseNotes"):
            content.pop(key)
        for split in content["splits"]:
            del split["numBytes"], split["shardLengths"]
    assert info == their_info


def test_everything_staged_comes_back_unchanged(cache):
    assert sorted(cache.file_paths) == [f"demo_{number}" for number in range(EPISODES)]
    with np.load(cache.folder / "steps.npz") as arrays:
        raw_actions = arrays["action"]
    for place, file_path in enumerate(cache.file_paths):
        number = int(file_path.removeprefix("demo_"))
        episode = drawn_episode(number)
        frames = np.flatnonzero(cache.episode == place)
        assert [cache.image_bytes(frame) for frame in frames] == episode["images"]
        assert [cache.wrist_bytes(frame) for frame in frames] == episode["wrist_images"]
        assert (raw_actions[frames] == episode["action"]).all()
        assert (cache.state[frames] == episode["state"]).all()
        assert cache.timestep[frames].tolist() == list(range(len(frames)))
        assert cache.instructions[place] == cache.instruction(frames[0]) == episode["instruction"]
    assert len(cache) == sum(2 + number for number in range(EPISODES))
    assert "tensorflow" not in sys.modules


def test_writing_the_same_again_does_nothing(dataset, staged, no_child):
    assert rlds.write_dataset(staged, dataset.parents[1], NAME) == dataset
    (staged / "episode_0.npz").touch()
    with pytest.raises(AssertionError, match="a process was started"):
        rlds.write_dataset(staged, dataset.parents[1], NAME)
    assert (dataset / "dataset_info.json").is_file()  # what was there before is kept when writing fails


def test_a_foreign_data_set_is_not_overwritten(copy, staged, no_child):
    (copy / rlds.STAGED_NOTE).unlink()
    with pytest.raises(ConfigError, match="from elsewhere"):
        rlds.write_dataset(staged, copy.parents[1], NAME)


def test_writing_nothing_is_refused(tmp_path, no_child):
    with pytest.raises(ConfigError, match="no finished episode"):
        rlds.write_dataset(tmp_path, tmp_path / "rlds", NAME)
    with pytest.raises(ConfigError, match="no finished episode"):
        rlds.write_dataset(tmp_path / "missing", tmp_path / "rlds", NAME)
    with pytest.raises(ConfigError, match="can't name a data set"):
        rlds.write_dataset(tmp_path, tmp_path / "rlds", "My-Set")


# Reading


def test_a_cache_is_made_once_and_anew_when_the_data_changes(cache, dataset, copy, tmp_path, no_child):
    assert rlds.build_cache(dataset, cache.folder.parent) == cache.folder
    shutil.copytree(dataset, tmp_path / "changed" / "1.0.0")
    (tmp_path / "changed/1.0.0/features.json").touch()
    with pytest.raises(AssertionError, match="a process was started"):
        rlds.build_cache(tmp_path / "changed/1.0.0", cache.folder.parent)


def test_own_validation_split_and_missing_optional_fields(copy, cache, tmp_path):
    drop_features(copy, "wrist_image", "state", "joint_state", "reward", "discount", "is_first")
    record = copy / f"{NAME}-train.tfrecord-00000-of-00001"
    shutil.copy(record, copy / f"{NAME}-val.tfrecord-00000-of-00001")
    info = json.loads((copy / "dataset_info.json").read_text())
    info["splits"].insert(0, info["splits"][0] | {"name": "val"})
    (copy / "dataset_info.json").write_text(json.dumps(info))

    lean = FrameCache(rlds.build_cache(copy, tmp_path / "cache"))
    assert lean.file_paths == cache.file_paths * 2
    assert lean.state is None and not lean.has_wrist
    assert [lean.image_bytes(f) for f in range(len(cache))] == [cache.image_bytes(f) for f in range(len(cache))]
    assert set(lean.episode[lean.train_indices()]) == {e for e in range(EPISODES) if cache.instructions[e]}
    assert set(lean.episode[lean.validation_indices()]) == {
        e + EPISODES for e in range(EPISODES) if cache.instructions[e]
    }
    with pytest.raises(ConfigError, match=r"no wrist_image.*num_images_in_input"):
        lean.wrist_bytes(0)


def test_missing_fields_are_named_and_nothing_is_left(copy, tmp_path):
    drop_features(copy, "action", "language_instruction")
    with pytest.raises(
        ConfigError, match=r"lacks a usual name of action and instruction .*--data_keys action=…,instruction=…"
    ):
        rlds.build_cache(copy, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_changed_byte_is_found_by_the_checksum(copy, tmp_path):
    record = copy / f"{NAME}-train.tfrecord-00000-of-00001"
    content = bytearray(record.read_bytes())
    content[len(content) // 2] ^= 1
    record.write_bytes(content)
    with pytest.raises(ConfigError, match=r"reading .* failed .*: download or collect the data set again"):
        rlds.build_cache(copy, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_folders_are_named_before_tensorflow_starts(copy, tmp_path, no_child):
    record = copy / f"{NAME}-train.tfrecord-00000-of-00001"
    record.write_bytes(record.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="tfrecord-00000-of-00001 is cut off"):
        rlds.build_cache(copy, tmp_path / "cache")
    with pytest.raises(ConfigError, match="missing doesn't exist"):
        rlds.build_cache(tmp_path / "missing", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no RLDS data set, as it has no dataset_info\.json"):
        rlds.build_cache(tmp_path / "empty", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_process_that_dies_is_reported(copy, tmp_path, monkeypatch):
    killed = tmp_path / "killed.sh"
    killed.write_text("#!/bin/sh\nkill -KILL $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(rlds.sys, "executable", str(killed))
    with pytest.raises(ConfigError, match="ended with code -9, perhaps for want of memory"):
        rlds.build_cache(copy, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_ends_the_child_and_leaves_nothing(copy, tmp_path, stop, code):
    (tmp_path / "slow.sh").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    (tmp_path / "slow.sh").chmod(0o755)
    program = f"""
import sys
from pathlib import Path
from prismatic.data import rlds
from prismatic.errors import exit_codes
sys.executable = "{tmp_path}/slow.sh"
with exit_codes():
    rlds.build_cache(Path("{copy}"), Path("{tmp_path}/cache"))
"""
    root = Path(rlds.__file__).parents[2]
    run = subprocess.Popen([sys.executable, "-c", program], cwd=root, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(run.pid, stop) if stop == signal.SIGINT else run.send_signal(stop)  # Ctrl-C reaches both
    assert run.wait(timeout=120) == code
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert list((tmp_path / "cache").iterdir()) == []


# The original's own data set


@pytest.fixture(scope="session")
def reference_cache(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> FrameCache:
    dataset = rlds.find_dataset(reference / "rlds", reference_name(reference))
    return FrameCache(rlds.build_cache(dataset, tmp_path_factory.mktemp("reference_cache")))


def test_reference_episodes_are_read_in_order(reference, reference_cache):
    expected = json.loads((reference / "rlds_pipeline.json").read_text())
    assert reference_cache.name == expected["dataset_name"]
    assert reference_cache.file_paths == expected["episode_file_paths_in_order"]
    assert reference_cache.instructions == expected["episode_instructions_in_order"]
    with (
        np.load(reference / "rlds_pipeline.npz") as arrays,
        np.load(reference_cache.folder / "steps.npz") as steps,
    ):
        assert steps["action"].tobytes() == arrays["raw_action"].tobytes()
        assert reference_cache.state.tobytes() == arrays["raw_state"].tobytes()
        assert np.bincount(reference_cache.episode).tolist() == arrays["episode_lengths"].tolist()


def test_reference_training_frames_are_the_originals(reference, reference_cache):
    expected = json.loads((reference / "rlds_pipeline.json").read_text())
    frames = reference_cache.train_indices()
    words = [reference_cache.instruction(frame) for frame in frames]
    assert words == expected["train_language_instruction"]
    assert "" in reference_cache.instructions and "" not in words
    assert len(reference_cache.validation_indices()) == 0
    with np.load(reference / "rlds_pipeline.npz") as arrays:
        assert reference_cache.timestep[frames].tolist() == arrays["train_timestep"].tolist()


def test_reference_statistics_come_out_of_the_cache(reference, reference_cache):
    expected = json.loads((reference / "rlds_dataset_statistics.json").read_text())
    found = {reference_cache.name: reference_cache.statistics}
    for entry in (*found.values(), *expected.values()):
        del entry["proprio"]  # OpenVLA's file has zeros there: it reads no state
    assert found == expected
