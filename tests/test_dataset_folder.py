"""RLDS folders found and checked by their files alone; here the records hold nothing but zeros."""

import json
from pathlib import Path

import pytest

from prismatic.data.dataset_folder import check_whole, dataset_name, find_dataset, listing
from prismatic.errors import ConfigError

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


def test_the_newest_version_is_found(version):
    for newer in ("1.9.0", "1.10.0"):
        make_folder(version.parent / newer)
    (version.parent / "2.0.0").mkdir()  # holds nothing
    make_folder(version.parent / "3.0.0.incomplete")
    assert find_dataset(version.parents[1], "a_set") == version.parent / "1.10.0"


def test_what_there_is_is_said(version, tmp_path):
    make_folder(tmp_path / "root/b_set/1.0.0")
    with pytest.raises(ConfigError, match=r"no data set 'absent'.*dataset_name.*a_set, b_set"):
        find_dataset(tmp_path / "root", "absent")
    with pytest.raises(ConfigError, match=r"data_root_dir .*missing doesn't exist"):
        find_dataset(tmp_path / "missing", "a_set")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="nor any other"):
        find_dataset(tmp_path / "empty", "a_set")


def test_a_root_one_level_off_is_taken_or_named(version):
    root = version.parents[1]
    assert find_dataset(root / "a_set", "a_set") == version
    assert find_dataset(root.parent, "a_set") == version
    with pytest.raises(ConfigError, match=r"is itself a data set: give --data_root_dir .*root --dataset_name a_set"):
        find_dataset(root / "a_set", "libero")
    with pytest.raises(ConfigError, match=r"root is a folder of data sets \(a_set\): give it as data_root_dir"):
        find_dataset(root.parent, "root")
    with pytest.raises(ConfigError, match=r"one that it holds \(root/a_set\)"):
        find_dataset(root.parent, "b_set")
    make_folder(root.parent / "other/a_set/1.0.0")
    with pytest.raises(ConfigError, match=r"other/a_set, root/a_set"):
        find_dataset(root.parent, "a_set")


def test_a_lerobot_folder_is_found_by_its_description(tmp_path):
    (tmp_path / "b_set/meta").mkdir(parents=True)
    (tmp_path / "b_set/meta/info.json").write_text("{}")
    assert find_dataset(tmp_path, "b_set") == tmp_path / "b_set"


def test_a_git_lfs_pointer_is_named(version):
    next(version.glob("*.tfrecord*")).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigError, match="git lfs pull"):
        check_whole(version)


def test_names_come_from_folders(version):
    assert dataset_name(version) == dataset_name(version.parent) == "a_set"


def test_a_whole_folder_passes(version):
    check_whole(version)


@pytest.mark.parametrize("cut", [1, 5, 510])
def test_a_cut_file_is_named(version, cut):
    path = version / "set-train.tfrecord-00001-of-00002"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ConfigError, match="tfrecord-00001-of-00002 is cut off"):
        check_whole(version)


def test_a_missing_file_is_counted(version):
    (version / "set-train.tfrecord-00001-of-00002").unlink()
    with pytest.raises(ConfigError, match="has 2 of the 3 episodes"):
        check_whole(version)


def test_a_data_set_without_episodes_is_refused(version):
    for path in version.glob("*.tfrecord*"):
        path.unlink()
    (version / "dataset_info.json").write_text('{"splits": []}')
    with pytest.raises(ConfigError, match="has 0 of the 0 episodes"):
        check_whole(version)


@pytest.mark.parametrize("content", ["{", "{}", '{"splits": [{"name": "train"}]}'])
def test_a_damaged_info_is_named(version, content):
    (version / "dataset_info.json").write_text(content)
    with pytest.raises(ConfigError, match=r"dataset_info\.json.*: download or collect"):
        check_whole(version)


def test_a_folder_without_the_json_files_is_no_data_set(version):
    (version / "features.json").unlink()
    with pytest.raises(ConfigError, match=r"no RLDS data set, as it has no features\.json"):
        check_whole(version)


def test_a_listing_changes_when_a_file_does(version):
    before = listing(version.iterdir())
    assert before == listing(version.iterdir())
    (version / "features.json").write_text("[]")
    assert listing(version.iterdir()) != before
