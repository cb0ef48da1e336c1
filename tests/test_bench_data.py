"""The benchmark of data, at a hundredth of the size."""

from pathlib import Path

import pytest

from prismatic.bench import data
from prismatic.errors import ConfigError


def test_it_writes_reads_and_loads_what_was_asked_for(tmp_path: Path) -> None:
    rows = data.run(tmp_path / "new", episodes=5, frames=96, num_workers=(0,))
    assert [row["what"] for row in rows] == [
        "write as RLDS", "read into the cache", "load with 0 processes", "an epoch, load with 0 processes",
    ]  # fmt: skip
    assert [row["frames"] for row in rows[:2]] == [96, 96] and all(row["frames/s"] > 0 for row in rows)
    jpegs = sum(len(jpeg) for jpeg in data.drawn_images()) / data.IMAGES
    assert 8_000 < jpegs < 30_000
    assert 0.5 < rows[1]["GB"] * 1e9 / (2 * 96 * jpegs) < 2
    early, late = (rows[-1][f"RssAnon MiB at {part}"] for part in ("10%", "100%"))
    assert early > 0 and late < 1.5 * early
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_timed_is_one_sentence(tmp_path: Path) -> None:
    for folder, episodes, sentence in ((tmp_path / "new", 100, "one an episode"), (tmp_path, 5, "cannot write")):
        with pytest.raises(ConfigError, match=sentence):
            data.run(folder, episodes=episodes, frames=96, num_workers=(0,))
    assert [*tmp_path.iterdir()] == []
