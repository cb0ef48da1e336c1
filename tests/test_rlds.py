"""RLDS written and read back, its LeRobot twin, and what is said about damaged folders. TensorFlow's few starts are shared."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from prismatic.data import lerobot_writer, rlds
from prismatic.data.examples import example
from prismatic.data.frames import FrameCache
from prismatic.data.mixture import open_cache
from prismatic.errors import ConfigError
from prismatic.image import decode_jpeg, jpeg_round_trip
from prismatic.processor import Processor
from prismatic.processor_files import load_processor
from tests.conftest import REPOSITORY
from tests.drawn_episodes import drawn_episode

NAME = "drawn_set"
EPISODES = 5
RECORD = f"{NAME}-train.tfrecord-00000-of-00001"


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    for number in range(EPISODES):
        rlds.stage_episode(folder / f"episode_{number}.npz", **drawn_episode(number))
    return folder


@pytest.fixture(scope="module")
def dataset(staged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rlds.write_dataset(staged, tmp_path_factory.mktemp("rlds"), NAME)


@pytest.fixture(scope="module")
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


# Writing and reading


def test_written_files_are_laid_out_as_the_references(dataset: Path, reference: Path) -> None:
    assert dataset.parts[-2:] == (NAME, "1.0.0") and [path.name for path in dataset.parent.iterdir()] == ["1.0.0"]
    assert {path.name for path in dataset.iterdir() if path.suffix != ".json"} == {RECORD}
    info = json.loads((dataset / "dataset_info.json").read_text())
    (split,) = info["splits"]
    assert (info["name"], split["name"], split["shardLengths"]) == (NAME, "train", [str(EPISODES)])
    theirs = rlds.find_dataset(reference / "rlds", reference_name(reference))
    features, their_features = (json.loads((folder / "features.json").read_text()) for folder in (dataset, theirs))
    assert features == their_features
    their_info = json.loads((theirs / "dataset_info.json").read_text())
    for content in (info, their_info):
        del content["name"], content["releaseNotes"]
        for split in content["splits"]:
            del split["numBytes"], split["shardLengths"]
    assert info == their_info


def test_everything_staged_comes_back_unchanged(cache: FrameCache) -> None:
    assert sorted(cache.file_paths) == [f"demo_{number}" for number in range(EPISODES)]
    assert cache.state is not None and len(cache) == sum(2 + number for number in range(EPISODES))
    raw_actions = np.load(cache.folder / "steps.npz")["action"]
    for place, file_path in enumerate(cache.file_paths):
        episode = drawn_episode(int(file_path.removeprefix("demo_")))
        frames = np.flatnonzero(cache.episode == place).tolist()
        assert [cache.image_bytes(frame) for frame in frames] == episode["images"]
        assert [cache.wrist_bytes(frame) for frame in frames] == episode["wrist_images"]
        assert (raw_actions[frames] == episode["action"]).all()
        assert (cache.state[frames] == episode["state"]).all()
        assert cache.timestep[frames].tolist() == list(range(len(frames)))
        assert cache.instructions[place] == cache.instruction(frames[0]) == episode["instruction"]
    assert "tensorflow" not in sys.modules


def test_a_cache_is_made_once_and_anew_when_the_data_changes(
    cache: FrameCache, dataset: Path, copy: Path, no_child: None
) -> None:
    assert rlds.build_cache(dataset, cache.folder.parent) == cache.folder
    (copy / "features.json").touch()
    with pytest.raises(AssertionError, match="a process was started"):
        rlds.build_cache(copy, cache.folder.parent)


def png(jpeg: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(decode_jpeg(jpeg)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_the_lerobot_twin_trains_alike(staged: Path, cache: FrameCache, tmp_path: Path, form: str) -> None:
    """PNG is what the real library writes: what RLDS decodes to is stored without loss, and becomes a JPEG of quality 95 when it is read."""
    twin = lerobot_writer.write_dataset(staged, tmp_path / "root", NAME, fps=10)
    for path in twin.glob("data/*/*") if form == "png" else ():
        table = pq.read_table(path)
        for name in (lerobot_writer.IMAGE, lerobot_writer.WRIST):
            rows = [row | {"bytes": png(row["bytes"])} for row in table.column(name).to_pylist()]
            column = pa.array(rows, type=table.schema.field(name).type)
            table = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(table, path)
    ours = open_cache(tmp_path / "root", NAME, cache_dir=tmp_path / "cache")
    assert (ours.fps, cache.fps) == (10, None)
    once_more = jpeg_round_trip if form == "png" else np.asarray
    plain = load_processor(REPOSITORY / "checkpoints" / "openvla-tiny")
    config = dataclasses.replace(plain.config, unnorm_key=NAME, num_images_in_input=2, proprio_dim=8)
    processor, other = (Processor(config, plain.tokenizer, {NAME: c.statistics}) for c in (ours, cache))
    place = {cache.instruction(f): f for f in reversed(range(len(cache)))}  # each episode's first frame
    for frame in range(len(ours)):
        twin_frame = place[ours.instruction(frame)] + int(ours.timestep[frame])
        mine, theirs = ours.step(frame), cache.step(twin_frame)
        for image, wanted in ((mine.image, theirs.image), (mine.wrist, theirs.wrist)):
            assert image and wanted and (image == wanted) == (form == "jpeg")
            assert (decode_jpeg(image) == once_more(decode_jpeg(wanted))).all()
        mine, theirs = example(mine, processor), example(theirs, other)
        for name in ("input_ids", "labels", "actions", "proprio", *(["pixel_values"] if form == "jpeg" else [])):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), (frame, name)
    # All that scales an action or a state is bit-equal. tfds shuffles the episodes, and float32 sums round by their order: so much may means
    # and deviations differ, which nothing reads.
    for part in ("action", "proprio"):
        for name, values in cache.statistics[part].items():
            tolerance: dict[str, Any] = {"rtol": 2e-6, "atol": 2e-7} if name in ("mean", "std") else {"rtol": 0}
            np.testing.assert_allclose(ours.statistics[part][name], values, **tolerance, err_msg=f"{part} {name}")


# What goes wrong


def test_what_is_wrong_is_said_before_tensorflow_starts(copy: Path, tmp_path: Path, no_child: None) -> None:
    (copy / RECORD).write_bytes((copy / RECORD).read_bytes()[:-1])
    for folder, sentence in ((copy, "00000-of-00001 is cut off"), (tmp_path / "missing", "missing doesn't exist")):
        with pytest.raises(ConfigError, match=sentence):
            rlds.build_cache(folder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(ConfigError, match="can't name a data set"):
        rlds.write_dataset(tmp_path, tmp_path / "rlds", "My-Set")


def test_a_changed_byte_is_found_by_the_checksum(copy: Path, tmp_path: Path) -> None:
    content = bytearray((copy / RECORD).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / RECORD).write_bytes(content)
    with pytest.raises(ConfigError, match=r"reading .* failed .*: download or collect the data set again"):
        rlds.build_cache(copy, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_process_that_dies_is_reported(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = tmp_path / "killed.sh"
    killed.write_text("#!/bin/sh\nkill -KILL $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(ConfigError, match="ended with code -9, perhaps for want of memory"):
        rlds.build_cache(copy, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_ends_the_child_and_leaves_nothing(copy: Path, tmp_path: Path, stop: signal.Signals, code: int) -> None:
    # A second, so that the call that starts it is over: a stop within it leaves a child, which the real one notices itself (PR_SET_PDEATHSIG)
    (tmp_path / "slow.sh").write_text(f"#!/bin/sh\nsleep 1\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
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
    run = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, start_new_session=True)
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


def test_the_reference_is_read_as_the_original_reads_it(reference: Path, tmp_path: Path) -> None:
    """Episodes in its order, the same training frames, and statistics that are equal bit for bit."""
    cache = FrameCache(rlds.build_cache(rlds.find_dataset(reference / "rlds", reference_name(reference)), tmp_path))
    expected = json.loads((reference / "rlds_pipeline.json").read_text())
    arrays = np.load(reference / "rlds_pipeline.npz")
    assert cache.name == expected["dataset_name"] and cache.state is not None
    assert cache.file_paths == expected["episode_file_paths_in_order"]
    assert cache.instructions == expected["episode_instructions_in_order"]
    assert np.load(cache.folder / "steps.npz")["action"].tobytes() == arrays["raw_action"].tobytes()
    assert cache.state.tobytes() == arrays["raw_state"].tobytes()
    assert np.bincount(cache.episode).tolist() == arrays["episode_lengths"].tolist()
    frames = cache.train_indices()
    words = [cache.instruction(frame) for frame in frames.tolist()]
    assert words == expected["train_language_instruction"]
    assert cache.timestep[frames].tolist() == arrays["train_timestep"].tolist()
    assert "" in cache.instructions and "" not in words and len(cache.validation_indices()) == 0
    statistics = json.loads((reference / "rlds_dataset_statistics.json").read_text())
    found = {cache.name: cache.statistics}
    for entry in (*found.values(), *statistics.values()):
        del entry["proprio"]  # OpenVLA's file has zeros there: it reads no state
    assert found == statistics
