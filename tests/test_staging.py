"""Staged episodes: whole or absent."""

import resource
from pathlib import Path
from typing import Any

import pytest

from prismatic.data.staging import load_episode, stage_episode
from prismatic.errors import ConfigError
from tests.drawn_episodes import drawn_episode


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"wrist_images": [b"a", b"b"]}, "3 images and 2 wrist images"), ({"images": []}, "0 images")],
)
def test_staging_refuses_fields_that_disagree(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        stage_episode(tmp_path / "e.npz", **(drawn_episode(1) | change))


def test_a_full_disk_leaves_no_half_episode(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # bytes a file may have: stands for a full disk
    try:
        with pytest.raises(ConfigError, match=r"can't write to .*: free space"):
            stage_episode(tmp_path / "e.npz", **drawn_episode(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_episode_comes_back_as_it_was_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    episode, path = drawn_episode(2), tmp_path / "later" / "e.npz"
    stage_episode(path, **episode)
    loaded = load_episode(path)
    for field in ("state", "joint_state", "action"):
        assert (getattr(loaded, field) == episode[field]).all()
    for field in ("images", "wrist_images", "instruction", "file_path"):
        assert getattr(loaded, field) == episode[field]
    assert [path.name for path in path.parent.iterdir()] == ["e.npz"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"e\.npz is damaged .*delete it"):
        load_episode(path)
