"""versions.py: what is recorded, and when a folder of weights counts as another."""

import shutil
from pathlib import Path

import pytest

from prismatic import versions


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 50_000)  # 12.8 MB: sampled
    (folder / "processor.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("")
    return folder


def test_versions_name_what_changes_scores() -> None:
    found = versions.versions()
    assert found["mujoco"] == versions.importlib.metadata.version("mujoco")
    assert found["libero"] and found["torch"] and found["python"]
    assert set(versions.SIMULATOR_PACKAGES) <= found.keys()
    assert versions._version("no-such-package") is None


def test_another_simulator_is_named_and_the_pins_are_those_that_are_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requirements = (versions.REPOSITORY / "requirements.txt").read_text()
    assert all(f"{name}=={pin} " in requirements for name, pin in versions.SIMULATOR_PINS.items())
    assert versions.unpinned_simulator() == []
    known = versions.versions()
    monkeypatch.setattr(versions, "versions", lambda: known | {"mujoco": "3.17.0", "robosuite": None})
    assert versions.unpinned_simulator() == ["mujoco 3.17.0, pinned 3.2.3", "robosuite None, pinned 1.4.0"]


def test_a_fingerprint_is_of_the_contents_wherever_it_lies(weights: Path) -> None:
    before, alone = (versions.folder_fingerprint(weights, weights_only=only) for only in (False, True))
    copy = Path(shutil.copytree(weights, weights.with_name("b")))
    (copy / "metrics.jsonl").write_text("more")
    (copy / "versions.json").write_text("{}")
    assert versions.folder_fingerprint(copy) == before and len(before) == 16
    (weights / "processor.json").write_text('{"center_crop": true}')
    assert versions.folder_fingerprint(weights) != before
    assert versions.folder_fingerprint(weights, weights_only=True) == alone != before
    found = {alone}
    for place in (0, 12_799_999):
        with (copy / "model.safetensors").open("r+b") as stream:
            stream.seek(place)
            stream.write(b"x")
        found.add(versions.folder_fingerprint(copy, weights_only=True))
    assert len(found) == 3


def test_native_checkpoints_lie_one_folder_down(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest.pt").write_bytes(b"one")
    before = versions.folder_fingerprint(tmp_path)
    (tmp_path / "checkpoints" / "latest.pt").write_bytes(b"two")
    assert versions.folder_fingerprint(tmp_path) != before


def test_a_stored_fingerprint_stays_valid(tmp_path: Path) -> None:
    """It stands in rollouts and in the names of staged episodes."""
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 50_000)
    (tmp_path / "config.json").write_text("{}")
    assert versions.folder_fingerprint(tmp_path) == "643e4b8615e3a391"
