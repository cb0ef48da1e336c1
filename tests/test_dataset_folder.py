"""Folders of data sets found and checked by their files alone; here the records hold nothing but zeros."""

import json
from pathlib import Path
from typing import Any

import pytest

from prismatic.data import rlds
from prismatic.data.dataset_folder import check_whole, dataset_name, find_dataset, listing
from prismatic.data.mixture import open_cache
from prismatic.errors import ConfigError
from prismatic.filenames import LEROBOT_INFO
from tests import pretended_hub

RECORD_SIZES = [30, 0, 500]  # bytes of content


def make_folder(version: Path) -> Path:
    """A version folder of three records in two files."""
    version.mkdir(parents=True)
    records = [size.to_bytes(8, "little") + bytes(4 + size + 4) for size in RECORD_SIZES]
    (version / "set-train.tfrecord-00000-of-00002").write_bytes(b"".join(records[:2]))
    (version / "set-train.tfrecord-00001-of-00002").write_bytes(records[2])
    info = {"splits": [{"name": "train", "shardLengths": ["2", "1"]}]}
    (version / "dataset_info.json").write_text(json.dumps(info))
    (version / "features.json").write_text("{}")
    return version


@pytest.fixture
def version(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "root/a_set/1.0.0")


def test_the_newest_version_is_found_and_named_by_its_folder(version: Path, tmp_path: Path) -> None:
    for newer in ("1.9.0", "1.10.0", "3.0.0.incomplete"):
        make_folder(version.parent / newer)
    (version.parent / "2.0.0").mkdir()  # holds nothing
    assert find_dataset(version.parents[1], "a_set") == version.parent / "1.10.0"
    assert dataset_name(version) == dataset_name(version.parent) == "a_set"
    (tmp_path / "b_set/meta").mkdir(parents=True)
    (tmp_path / "b_set" / LEROBOT_INFO).write_text("{}")
    assert find_dataset(tmp_path, "b_set") == tmp_path / "b_set"


def test_a_root_one_level_off_is_taken(version: Path) -> None:
    assert find_dataset(version.parent, "a_set") == find_dataset(version.parents[2], "a_set") == version


@pytest.mark.parametrize(
    ("root", "name", "sentence"),
    [
        ("root", "absent", r"no data set 'absent'.*--data_root_dir .*root --dataset_name a_set \| b_set$"),
        ("missing", "a_set", r"data_root_dir .*missing doesn't exist"),
        ("empty", "a_set", "give the folder of one"),
        ("root/a_set", "libero", r"--data_root_dir .*root --dataset_name a_set$"),
        (".", "root", r"other --dataset_name a_set; or .*root --dataset_name a_set \| b_set"),
        (".", "a_set", r"other --dataset_name a_set; or .*root --dataset_name a_set \| b_set"),  # which of the two?
    ],
)
def test_what_there_is_is_said(version: Path, tmp_path: Path, root: str, name: str, sentence: str) -> None:
    for other in ("root/b_set", "other/a_set"):
        make_folder(tmp_path / other / "1.0.0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=sentence):
        find_dataset(tmp_path / root, name)


def write(name: str, content: str) -> Any:
    return lambda version: (version / name).write_text(content)


def cut(size: int) -> Any:
    def shorten(version: Path) -> None:
        path = version / "set-train.tfrecord-00001-of-00002"
        path.write_bytes(path.read_bytes()[:-size])

    return shorten


def empty(version: Path) -> None:
    for path in version.glob("*.tfrecord*"):
        path.unlink()
    write("dataset_info.json", '{"splits": []}')(version)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        *((cut(size), "tfrecord-00001-of-00002 is cut off") for size in (1, 5, 510)),
        (lambda version: (version / "set-train.tfrecord-00001-of-00002").unlink(), "has 2 of the 3 episodes"),
        (empty, "has 0 of the 0 episodes"),
        *((write("dataset_info.json", text), r"dataset_info\.json.*: download or collect")
          for text in ("{", "{}", '{"splits": [{"name": "train"}]}')),
        (write("dataset_info.json", '{"splits": [{"shardLengths": [3], "filepathTemplate": "/elsewhere/{SPLIT}"}]}'),
         "filepathTemplate names files outside"),
        (lambda version: (version / "features.json").unlink(), r"no RLDS data set, as it has no features\.json"),
        (write("set-train.tfrecord-00000-of-00002", "version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_named(version: Path, damage: Any, sentence: str) -> None:
    check_whole(version)
    before = listing(version.iterdir())
    assert before == listing(version.iterdir())
    damage(version)
    assert listing(version.iterdir()) != before
    with pytest.raises(ConfigError, match=sentence):
        check_whole(version)


def test_a_link_that_leads_nowhere_is_named(version: Path) -> None:
    (version / "set-train.tfrecord-00000-of-00002").unlink()
    (version / "set-train.tfrecord-00000-of-00002").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="tfrecord-00000-of-00002 is a link that leads nowhere: fetch"):
        rlds.build_cache(version, version / "cache")


@pytest.mark.parametrize("name", ["", "A", "1a", "a/b", "a\n", "a" * 101])
def test_a_name_that_no_new_data_set_can_have(name: str) -> None:
    rlds.check_name("a" * 100)
    with pytest.raises(ConfigError, match=r"can't name a data set .*at most 100"):
        rlds.check_name(name)


def test_of_a_hub_s_data_sets_one_is_fetched(version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "root/b_set/1.0.0")
    for stray in (
        "dataset_info.json",
        "train/dataset_info.json",
        "README.md",
    ):  # as the library of data sets saves them
        (version.parents[1] / stray).parent.mkdir(exist_ok=True)
        (version.parents[1] / stray).write_text("{}")
    snapshot = tmp_path / "hub/snapshots/0123abc"
    pretended_hub.serve(monkeypatch, "someone/sets", "dataset", files=version.parents[1], snapshot=snapshot)
    opened: list[Path] = []
    monkeypatch.setattr(rlds, "build_cache", lambda source, *_, **__: opened.append(source) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_cache("someone/sets", "a_set", cache_dir=tmp_path / "cache")
    assert opened == [snapshot / "a_set/1.0.0"]
    check_whole(opened[0])
    assert [path.name for path in (snapshot / "b_set").rglob("*.*") if path.is_file()] == ["dataset_info.json"]
    assert not (snapshot / "README.md").exists()
    for name in ("absent", str(version.parent)):
        with pytest.raises(ConfigError, match=r"someone/sets holds no .*: give --dataset_name a_set \| b_set$"):
            open_cache("someone/sets", name, cache_dir=tmp_path / "cache")
