"""The whole loop through the real scripts and the real simulator, with the smallest numbers: proves that each stage reads what the last wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import imageio.v3 as iio
import pytest

from prismatic.data.staging import load_episode
from prismatic.image import decode_jpeg
from tests.conftest import REPOSITORY

BASE = REPOSITORY / "checkpoints" / "openvla-tiny"
TASK = ["--task_suite_name", "libero_spatial", "--task_ids", "0"]


def script(*words: str | Path | int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def collect(place: Path) -> tuple[str | Path, ...]:
    """Two demonstrations; where they are, as flags."""
    where = ("--data_root_dir", place / "data", "--dataset_name", "two")
    script("collect.py", *TASK, *where, "--num_demos_per_task", 2, "--num_workers", 1)
    return where


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two demonstrations collected, and an adapter trained on them for a few steps."""
    place = tmp_path_factory.mktemp("loop")
    where = collect(place)
    script(
        *("finetune.py", "--vla_path", BASE, *where, "--run_root_dir", place / "runs", "--cache_dir", place / "cache"),
        *("--batch_size", 4, "--max_steps", 3, "--save_steps", 3, "--num_workers", 0),
    )
    return place


def evaluate(place: Path, *flags: str | Path | int) -> tuple[str, Path]:
    output = script(
        "eval.py", *TASK, "--local_log_dir", place / "rollouts", "--render_quality", "fast", "--num_workers", 1, *flags
    )
    (folder,) = (place / "rollouts").iterdir()
    return output, folder


def test_demonstrations_become_an_adapter_and_the_adapter_a_rollout(place: Path) -> None:
    (adapter,) = (place / "runs").glob("*/latest")
    flags = ("--pretrained_checkpoint", adapter, "--num_trials_per_task", 1)
    _, folder = evaluate(place, *flags)
    (row,) = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert row["error"] is None and row["instruction"].startswith("pick up the black bowl between")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["episodes"], summary["errors"]) == (1, 0)
    video = iio.improps(folder / row["video"], plugin="FFMPEG")
    assert video.shape[0] >= row["steps"] and row["video"].startswith("episode=") and "--task=" in row["video"]
    assert row["video"] in unquote((folder / "report.html").read_text())
    again, _ = evaluate(place, *flags)
    assert "1 of 1 episodes are already in" in again


def test_a_demonstration_is_as_the_public_ones_and_is_made_once(place: Path) -> None:
    paths = [*(place / "data" / "two_staged").glob("*.npz")]
    kept = [path.stat().st_mtime_ns for path in paths]
    episode = load_episode(paths[0])
    assert 30 < len(episode.images) == len(episode.wrist_images) == len(episode.action) < 90
    assert decode_jpeg(episode.images[0]).shape == decode_jpeg(episode.wrist_images[0]).shape == (256, 256, 3)
    assert (episode.action[0, 6], set(episode.action[:, 6])) == (-1, {-1.0, 1.0})  # starts open; LIBERO's convention
    assert episode.state is not None and episode.state[0, 6] > 0.03  # a finger's opening, m
    assert episode.instruction.startswith("pick up the black bowl between")
    collect(place)
    assert [path.stat().st_mtime_ns for path in paths] == kept


def test_the_data_set_is_rlds_as_the_public_one(place: Path, reference: Path) -> None:
    name = "features.json"
    ours = json.loads((place / "data" / "two" / "1.0.0" / name).read_text())
    assert ours == json.loads((reference / "rlds" / "libero_spatial_no_noops" / "1.0.0" / name).read_text())
