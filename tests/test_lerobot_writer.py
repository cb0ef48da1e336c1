"""A LeRobot data set of staged episodes: the form that the real library reads, and the same training as its RLDS twin."""

import dataclasses
import io
import json
import shutil
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
from prismatic.data.staging import stage_episode
from prismatic.errors import ConfigError
from prismatic.image import decode_jpeg, jpeg_round_trip
from prismatic.processor import Example, Processor
from prismatic.processor_files import load_processor
from tests.conftest import REPOSITORY
from tests.drawn_episodes import drawn_episode

BASE = REPOSITORY / "checkpoints" / "openvla-tiny"
EPISODES = 3


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    for number in range(EPISODES):
        stage_episode(folder / f"episode_{number}.npz", **drawn_episode(number))
    return folder


@pytest.fixture(scope="module")
def dataset(staged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lerobot_writer.write_dataset(staged, tmp_path_factory.mktemp("lerobot"), "twin", fps=10)


def cached(dataset: Path, place: Path) -> FrameCache:
    root = dataset.parent if dataset.name == "twin" else dataset.parents[1]
    return open_cache(root, "twin", cache_dir=place)


def by_episode(cache: FrameCache) -> dict[str, list[tuple]]:
    """Instruction → its steps: an order that both formats share."""
    steps: dict[str, list[tuple]] = {}
    for frame in range(len(cache)):
        step = cache[frame]
        content = (step.image, step.wrist, step.actions.tobytes(), None if step.state is None else step.state.tobytes())
        steps.setdefault(step.instruction, []).append(content)
    return steps


@pytest.fixture(scope="module")
def from_rlds(staged: Path, tmp_path_factory: pytest.TempPathFactory) -> FrameCache:
    place = tmp_path_factory.mktemp("rlds")
    return cached(rlds.write_dataset(staged, place / "root", "twin"), place / "cache")


def check_statistics(one: dict[str, Any], other: dict[str, Any]) -> None:
    """All that scales an action or a state is bit-equal, as it does not depend on the order of the rows. The formats hold the episodes in
    different orders (tfds shuffles them), and float32 sums round by their order: so much may means and deviations differ, which nothing reads.
    """
    assert one.keys() == other.keys() and one["action"].keys() == other["action"].keys()
    for key in ("num_transitions", "num_trajectories"):
        assert one[key] == other[key]
    assert one["action"]["mask"] == other["action"]["mask"]
    for part in ("action", "proprio"):
        for name in ("min", "max", "q01", "q99"):
            assert one[part][name] == other[part][name]
        for name in ("mean", "std"):
            np.testing.assert_allclose(one[part][name], other[part][name], rtol=2e-6, atol=2e-7)


def samples(cache: FrameCache) -> dict[str, list[Example]]:
    """Instruction → what a model that reads a wrist view and a state would be given of each of its steps."""
    plain = load_processor(BASE)
    config = dataclasses.replace(plain.config, unnorm_key=cache.name, num_images_in_input=2, proprio_dim=8)
    processor = Processor(config, plain.tokenizer, {cache.name: cache.statistics})
    made: dict[str, list[Example]] = {}
    for frame in range(len(cache)):
        made.setdefault(cache.instruction(frame), []).append(example(cache[frame], processor))
    return made


def check_samples(one: FrameCache, other: FrameCache, *, pixels: bool) -> None:
    """Token ids, labels, normalised actions and states are equal bit for bit, and, if asked for, so are the pixels."""
    ours, theirs = samples(one), samples(other)
    assert {text: len(steps) for text, steps in ours.items()} == {text: len(steps) for text, steps in theirs.items()}
    for text, steps in ours.items():
        for ours_, theirs_ in zip(steps, theirs[text], strict=True):
            for name in ("input_ids", "labels", "actions", "proprio", *(["pixel_values"] if pixels else [])):
                assert torch.equal(getattr(ours_, name), getattr(theirs_, name)), (text, name)


def test_the_same_episodes_in_both_formats_train_alike(from_rlds: FrameCache, dataset: Path, tmp_path: Path) -> None:
    from_lerobot = cached(dataset, tmp_path / "b")
    assert by_episode(from_lerobot) == by_episode(from_rlds)  # images byte for byte
    check_statistics(from_rlds.statistics, from_lerobot.statistics)
    check_samples(from_rlds, from_lerobot, pixels=True)
    assert (from_lerobot.fps, from_rlds.fps) == (10, None)


def test_a_twin_of_png_differs_by_one_jpeg_alone(from_rlds: FrameCache, dataset: Path, tmp_path: Path) -> None:
    """As the real library writes images: what RLDS decodes to is stored without loss, and becomes a JPEG of quality 95 when it is read."""
    twin = Path(shutil.copytree(dataset, tmp_path / "root" / "twin"))
    for path in twin.glob("data/*/*"):
        table = pq.read_table(path)
        for name in (lerobot_writer.IMAGE, lerobot_writer.WRIST):
            images = [row | {"bytes": png(row["bytes"])} for row in table.column(name).to_pylist()]
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(images, type=table.schema.field(name).type))
        pq.write_table(table, path)
    from_png = open_cache(twin.parent, "twin", cache_dir=tmp_path / "cache")
    check_statistics(from_rlds.statistics, from_png.statistics)
    check_samples(from_rlds, from_png, pixels=False)
    ours, theirs = by_episode(from_png), by_episode(from_rlds)
    for text, steps in ours.items():
        for one, other in zip(steps, theirs[text], strict=True):
            for jpeg, original in zip(one[:2], other[:2], strict=True):
                assert jpeg != original
                assert (decode_jpeg(jpeg) == jpeg_round_trip(decode_jpeg(original))).all()


def png(jpeg: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(decode_jpeg(jpeg)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_the_library_s_layout(dataset: Path) -> None:
    info = json.loads((dataset / "meta/info.json").read_text())
    lengths = [len(drawn_episode(number)["action"]) for number in range(EPISODES)]
    assert (info["codebase_version"], info["total_frames"], info["total_episodes"]) == ("v3.0", sum(lengths), EPISODES)
    rows = pq.ParquetFile(dataset / info["data_path"].format(chunk_index=0, file_index=0))
    assert rows.num_row_groups == EPISODES and set(rows.schema_arrow.names) == set(info["features"])
    features = json.loads(rows.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features["action"] == {"feature": {"dtype": "float32", "_type": "Value"}, "length": 7, "_type": "List"}
    index = json.loads(pq.read_schema(dataset / "meta/tasks.parquet").metadata[b"pandas"])["index_columns"]
    assert index == ["task"]
    episodes = pq.read_table(next((dataset / "meta/episodes").rglob("*.parquet"))).to_pylist()
    assert [row["length"] for row in episodes] == lengths and episodes[-1]["dataset_to_index"] == sum(lengths)
    stats = json.loads((dataset / "meta/stats.json").read_text())
    rows_of_action = np.concatenate([drawn_episode(number)["action"] for number in range(EPISODES)])
    np.testing.assert_allclose(stats["action"]["mean"], rows_of_action.mean(0), atol=1e-6)
    assert np.shape(stats[lerobot_writer.IMAGE]["std"]) == (3, 1, 1)


def test_files_roll_over_and_stay_one_set(staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cached(lerobot_writer.write_dataset(staged, tmp_path / "one", "twin"), tmp_path / "a")
    monkeypatch.setattr(lerobot_writer, "FILE_BYTES", 1)
    monkeypatch.setattr(lerobot_writer, "CHUNK_FILES", 2)
    dataset = lerobot_writer.write_dataset(staged, tmp_path / "many", "twin")
    files = sorted(str(path.relative_to(dataset)) for path in dataset.glob("data/*/*"))
    assert files == [f"data/chunk-{n // 2:03d}/file-{n % 2:03d}.parquet" for n in range(EPISODES)]
    assert cached(dataset, tmp_path / "b").fingerprint == whole.fingerprint


def test_writing_again_replaces_only_its_own(staged: Path, dataset: Path, tmp_path: Path) -> None:
    before = (dataset / "meta/info.json").stat().st_mtime_ns
    assert lerobot_writer.write_dataset(staged, dataset.parent, "twin", fps=10) == dataset
    assert (dataset / "meta/info.json").stat().st_mtime_ns == before
    (tmp_path / "foreign").mkdir()
    with pytest.raises(ConfigError, match="from elsewhere and is kept"):
        lerobot_writer.write_dataset(staged, tmp_path, "foreign")
    with pytest.raises(ConfigError, match="no finished episode"):
        lerobot_writer.write_dataset(tmp_path / "nothing", tmp_path, "new")


def test_two_arms_one_camera_and_no_state(tmp_path: Path) -> None:
    for number in range(2):
        drawn = drawn_episode(number)
        arms = np.concatenate([drawn["action"], drawn["action"]], axis=1)
        stage_episode(tmp_path / f"s/{number}.npz", images=drawn["images"], action=arms, instruction="lift")
        stage_episode(
            tmp_path / f"bad/{number}.npz", images=drawn["images"], action=arms[:, : 14 - number], instruction="lift"
        )
    for dataset in (
        lerobot_writer.write_dataset(tmp_path / "s", tmp_path / "l", "twin"),
        rlds.write_dataset(tmp_path / "s", tmp_path / "r", "twin"),
    ):
        cache = cached(dataset, tmp_path / "cache")
        assert cache.actions.shape[1] == 14 and cache.state is None and not cache.has_wrist
        assert cache.gripper.dims == () and cache.statistics["action"]["mask"] == [True] * 14
    with pytest.raises(ConfigError, match=r"action of the staged episode .*1\.npz has another shape"):
        lerobot_writer.write_dataset(tmp_path / "bad", tmp_path / "l", "bad")
    assert not (tmp_path / "l/bad").exists()
