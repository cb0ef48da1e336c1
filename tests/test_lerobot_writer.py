"""A LeRobot data set of staged episodes: the form that the real library reads. That it trains as its RLDS twin does is test_rlds.py's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from prismatic.data import lerobot_writer
from prismatic.data.mixture import open_cache
from prismatic.data.staging import stage_episode
from prismatic.errors import ConfigError
from prismatic.filenames import LEROBOT_INFO
from prismatic.image import decode_jpeg, encode_jpeg
from tests.drawn_episodes import drawn_episode

EPISODES = [drawn_episode(number) for number in range(3)]


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    for number, episode in enumerate(EPISODES):
        stage_episode(tmp_path / f"staged/episode_{number}.npz", **episode)
    return tmp_path / "staged"


def test_the_library_s_layout(staged: Path, tmp_path: Path) -> None:
    dataset = lerobot_writer.write_dataset(staged, tmp_path / "lerobot", "drawn")
    info = json.loads((dataset / LEROBOT_INFO).read_text())
    lengths = [len(episode["action"]) for episode in EPISODES]
    assert (info["codebase_version"], info["total_frames"], info["total_episodes"]) == ("v3.0", sum(lengths), 3)
    rows = pq.ParquetFile(dataset / info["data_path"].format(chunk_index=0, file_index=0))
    assert rows.num_row_groups == 3 and set(rows.schema_arrow.names) == set(info["features"])
    features = json.loads(rows.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features["action"] == {"feature": {"dtype": "float32", "_type": "Value"}, "length": 7, "_type": "List"}
    index = json.loads(pq.read_schema(dataset / "meta/tasks.parquet").metadata[b"pandas"])["index_columns"]
    assert index == ["task"]
    episodes = pq.read_table(next((dataset / "meta/episodes").rglob("*.parquet"))).to_pylist()
    assert [row["length"] for row in episodes] == lengths and episodes[-1]["dataset_to_index"] == sum(lengths)
    stats = json.loads((dataset / "meta/stats.json").read_text())
    actions = np.concatenate([episode["action"] for episode in EPISODES])
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(0), atol=1e-6)
    assert np.shape(stats[lerobot_writer.IMAGE]["std"]) == (3, 1, 1)


def test_several_files_are_one_set(staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot_writer, "EPISODES_A_FILE", 1)
    monkeypatch.setattr(lerobot_writer, "CHUNK_FILES", 2)
    dataset = lerobot_writer.write_dataset(staged, tmp_path / "lerobot", "drawn")
    files = sorted(str(path.relative_to(dataset)) for path in dataset.glob("data/*/*"))
    assert files == [f"data/chunk-{n // 2:03d}/file-{n % 2:03d}.parquet" for n in range(3)]
    cache = open_cache(tmp_path / "lerobot", "drawn", cache_dir=tmp_path / "cache")
    images = [image for episode in EPISODES for image in episode["wrist_images"]]
    assert [cache.wrist_bytes(frame) for frame in range(len(cache))] == images
    how: dict[str, Any] = {"data_keys": "image=image2,wrist=none,state=none", "rotate_images": True}
    told = open_cache(tmp_path / "lerobot", "drawn", cache_dir=tmp_path / "cache", **how)
    assert told.state is None and not told.has_wrist
    turned = encode_jpeg(np.ascontiguousarray(decode_jpeg(images[3])[::-1, ::-1]))
    assert told.image_bytes(3) == turned


@pytest.mark.parametrize("other", ["larger", "one camera", "the first has one"])
def test_an_episode_of_another_form_is_named_before_all_are_written(tmp_path: Path, other: str) -> None:
    usual, changed = dict(EPISODES[0]), dict(EPISODES[1])
    if other == "larger":
        changed["images"] = [encode_jpeg(np.zeros((96, 96, 3), np.uint8))] * len(changed["images"])
    else:
        (changed if other == "one camera" else usual).pop("wrist_images")
    for number, episode in enumerate((usual, changed)):
        stage_episode(tmp_path / f"staged/{number}.npz", **episode)
    with pytest.raises(
        ConfigError, match=r"1\.npz has images, actions or a state of unequal lengths, or of another form"
    ):
        lerobot_writer.write_dataset(tmp_path / "staged", tmp_path / "lerobot", "drawn")


def test_two_arms_one_camera_and_no_state(tmp_path: Path) -> None:
    for number, episode in enumerate(EPISODES[:2]):
        arms = np.tile(episode["action"], 2)
        for kind, action in (("good", arms), ("bad", arms[:, : 14 - number])):
            path = tmp_path / kind / f"{number}.npz"
            stage_episode(path, images=episode["images"], action=action, instruction="lift")
    lerobot_writer.write_dataset(tmp_path / "good", tmp_path / "lerobot", "arms")
    cache = open_cache(tmp_path / "lerobot", "arms", cache_dir=tmp_path / "cache")
    assert cache.actions.shape[1] == 14 and cache.state is None and not cache.has_wrist and cache.gripper.dims == ()
    with pytest.raises(
        ConfigError, match=r"1\.npz has images, actions or a state of unequal lengths, or of another form"
    ):
        lerobot_writer.write_dataset(tmp_path / "bad", tmp_path / "lerobot", "bad")
    assert not (tmp_path / "lerobot/bad").exists()
