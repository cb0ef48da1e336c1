"""Files and folders are whole or as before, whatever the disk says, and the first error is the one that is told."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from prismatic import atomic
from prismatic.errors import ConfigError

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, SafetensorError("Error while serializing: I/O error: No space left on device"),
                                   RuntimeError("write failed: No space left on device")], ids=repr)  # fmt: skip
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path: Path, error: Exception) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("whole")
    with pytest.raises(ConfigError, match="No space left") as told, atomic.whole_folder(folder) as partial:
        (partial / "new").write_text("half")
        raise error
    assert "\n" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and (folder / "old").read_text() == "whole"


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic.whole_folder(tmp_path / "folder"):
        raise KeyError("a bug")
    assert not list(tmp_path.iterdir())


def test_a_folder_takes_the_place_of_the_old_one_and_of_a_killed_calls_rest(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-folder").mkdir()
    (tmp_path / ".unfinished-folder" / "rest").touch()
    for content in ("first", "second"):
        with atomic.whole_folder(tmp_path / "folder") as partial:
            (partial / "file").write_text(content)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]
    assert (tmp_path / "folder" / "file").read_text() == "second"


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: seen.append((tmp_path / "run.json").exists()))
    atomic.write_json(tmp_path / "run.json", {"a": 1})
    assert seen == [False] and (tmp_path / "run.json").exists()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic.write_whole(tmp_path / "file", b"old")

    def full(descriptor: int) -> None:
        raise FULL

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        atomic.write_whole(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_a_kill_between_the_old_folder_and_the_new_one_loses_neither(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    folder.rename(tmp_path / ".previous-folder")  # as a call leaves it that was killed at its end
    with pytest.raises(KeyError), atomic.whole_folder(folder):
        assert (folder / "file").read_text() == "old"
        raise KeyError("a bug")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]


def test_what_killed_calls_were_writing_is_swept_but_not_what_is_being_written(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-3").mkdir()
    for number in ("99999999", os.getpid()):
        (tmp_path / f".unfinished-run.json.{number}").touch()
    atomic.sweep(tmp_path, "*.*")
    assert {path.name for path in tmp_path.iterdir()} == {".unfinished-3", f".unfinished-run.json.{os.getpid()}"}
    atomic.sweep(tmp_path)
    assert not (tmp_path / ".unfinished-3").exists()
