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
from prismatic.filenames import LEROBOT_INFO
from prismatic.image import decode_jpeg, jpeg_round_trip
from prismatic.processor import Example, Processor
from prismatic.processor_files import load_processor
from tests.conftest import REPOSITORY
from tests.drawn_episodes import drawn_episode

BASE = REPOSITORY / "checkpoints" / "openvla-tiny"
EPISODES = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the episodes, staged, and the data set of them in both formats."""
    place = tmp_path_factory.mktemp("twins")
    for number in range(EPISODES):
        stage_episode(place / f"staged/episode_{number}.npz", **drawn_episode(number))
    lerobot_writer.write_dataset(place / "staged", place / "lerobot", "twin", fps=10)
    rlds.write_dataset(place / "staged", place / "rlds", "twin")
    return place


def opened(root: Path) -> FrameCache:
    return open_cache(root, "twin", cache_dir=root.with_name(f"{root.name}-cache"))


def check_statistics(one: dict[str, Any], other: dict[str, Any]) -> None:
    """All that scales an action or a state is bit-equal, as it does not depend on the order of the rows. The formats hold the episodes in
    different orders (tfds shuffles them), and float32 sums round by their order: so much may means and deviations differ, which nothing reads.
    """
    for part in ("action", "proprio"):
        for name in ("mean", "std"):
            np.testing.assert_allclose(one[part].pop(name), other[part].pop(name), rtol=2e-6, atol=2e-7)
    assert one == other


def samples(cache: FrameCache) -> dict[str, list[Example]]:
    """Instruction → what a model that reads a wrist view and a state would be given of each of its steps: an order that both formats share."""
    plain = load_processor(BASE)
    config = dataclasses.replace(plain.config, unnorm_key=cache.name, num_images_in_input=2, proprio_dim=8)
    processor = Processor(config, plain.tokenizer, {cache.name: cache.statistics})
    made: dict[str, list[Example]] = {}
    for frame in range(len(cache)):
        made.setdefault(cache.instruction(frame), []).append(example(cache[frame], processor))
    return made


def images(cache: FrameCache) -> dict[str, list[bytes]]:
    """Instruction → its images."""
    found: dict[str, list[bytes]] = {}
    for frame in range(len(cache)):
        found.setdefault(cache.instruction(frame), []).extend((cache.image_bytes(frame), cache.wrist_bytes(frame)))
    return found


def png(jpeg: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(decode_jpeg(jpeg)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_the_same_episodes_in_both_formats_train_alike(place: Path, tmp_path: Path, form: str) -> None:
    """PNG is what the real library writes: what RLDS decodes to is stored without loss, and becomes a JPEG of quality 95 when it is read."""
    twin = Path(shutil.copytree(place / "lerobot/twin", tmp_path / "root/twin"))
    for path in twin.glob("data/*/*") if form == "png" else ():
        table = pq.read_table(path)
        for name in (lerobot_writer.IMAGE, lerobot_writer.WRIST):
            rows = [row | {"bytes": png(row["bytes"])} for row in table.column(name).to_pylist()]
            column = pa.array(rows, type=table.schema.field(name).type)
            table = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(table, path)
    ours, theirs = opened(tmp_path / "root"), opened(place / "rlds")
    assert (ours.fps, theirs.fps) == (10, None)
    once_more = jpeg_round_trip if form == "png" else np.asarray
    for text, jpegs in images(theirs).items():
        for one, other in zip(images(ours)[text], jpegs, strict=True):
            assert (one == other) == (form == "jpeg")
            assert (decode_jpeg(one) == once_more(decode_jpeg(other))).all()
    found, wanted = samples(ours), samples(theirs)
    assert found.keys() == wanted.keys()
    for text, steps in wanted.items():
        for one, other in zip(found[text], steps, strict=True):
            for name in ("input_ids", "labels", "actions", "proprio", *(["pixel_values"] if form == "jpeg" else [])):
                assert torch.equal(getattr(one, name), getattr(other, name)), (text, name)
    check_statistics(ours.statistics, theirs.statistics)


def test_the_library_s_layout(place: Path) -> None:
    dataset = place / "lerobot/twin"
    info = json.loads((dataset / LEROBOT_INFO).read_text())
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


def test_several_files_stay_one_set(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot_writer, "EPISODES_A_FILE", 1)
    monkeypatch.setattr(lerobot_writer, "CHUNK_FILES", 2)
    dataset = lerobot_writer.write_dataset(place / "staged", tmp_path / "many", "twin")
    files = sorted(str(path.relative_to(dataset)) for path in dataset.glob("data/*/*"))
    assert files == [f"data/chunk-{n // 2:03d}/file-{n % 2:03d}.parquet" for n in range(EPISODES)]
    assert opened(tmp_path / "many").fingerprint == opened(place / "lerobot").fingerprint


def test_two_arms_one_camera_and_no_state(tmp_path: Path) -> None:
    for number in range(2):
        drawn = drawn_episode(number)
        arms = np.concatenate([drawn["action"], drawn["action"]], axis=1)
        for kind, action in (("s", arms), ("bad", arms[:, : 14 - number])):
            stage_episode(tmp_path / f"{kind}/{number}.npz", images=drawn["images"], action=action, instruction="lift")
    lerobot_writer.write_dataset(tmp_path / "s", tmp_path / "l", "twin")
    rlds.write_dataset(tmp_path / "s", tmp_path / "r", "twin")
    for cache in (opened(tmp_path / "l"), opened(tmp_path / "r")):
        assert cache.actions.shape[1] == 14 and cache.state is None and not cache.has_wrist
        assert cache.gripper.dims == () and cache.statistics["action"]["mask"] == [True] * 14
    with pytest.raises(ConfigError, match=r"action of the staged episode .*1\.npz has another shape"):
        lerobot_writer.write_dataset(tmp_path / "bad", tmp_path / "l", "bad")
    assert not (tmp_path / "l/bad").exists()
