"""Staged episodes: whole or absent."""

import resource
from typing import Any

import pytest

from prismatic.data.staging import load_episode, stage_episode
from prismatic.errors import ConfigError
from tests.drawn_episodes import drawn_episode


def test_staging_refuses_fields_that_disagree(tmp_path):
    episode = drawn_episode(1)
    shorter: dict[str, Any] = {"wrist_images": episode["wrist_images"][:2]}
    with pytest.raises(ValueError, match="3 images and 2 wrist images"):
        stage_episode(tmp_path / "e.npz", **(episode | shorter))
    nothing: dict[str, Any] = {"images": []}
    with pytest.raises(ValueError, match="0 images"):
        stage_episode(tmp_path / "e.npz", **(episode | nothing))


def test_a_full_disk_leaves_no_half_episode(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # bytes a file may have: stands for a full disk
    try:
        with pytest.raises(ConfigError, match=r"can't write to .*: free space"):
            stage_episode(tmp_path / "e.npz", **drawn_episode(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_episode_comes_back_as_it_was(tmp_path):
    episode = drawn_episode(2)
    stage_episode(tmp_path / "later" / "e.npz", **episode)
    loaded = load_episode(tmp_path / "later" / "e.npz")
    assert (loaded.images, loaded.wrist_images) == (episode["images"], episode["wrist_images"])
    for field in ("state", "joint_state", "action"):
        assert (getattr(loaded, field) == episode[field]).all()
    assert (loaded.instruction, loaded.file_path) == (episode["instruction"], episode["file_path"])
    assert [path.name for path in (tmp_path / "later").iterdir()] == ["e.npz"]


def test_a_damaged_episode_is_named(tmp_path):
    path = tmp_path / "e.npz"
    stage_episode(path, **drawn_episode(1))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"e\.npz is damaged .*delete it"):
        load_episode(path)
