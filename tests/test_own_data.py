"""examples/own_data.py, from recordings to a policy that answers, with one arm and with two."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from prismatic.data.mixture import open_cache
from prismatic.filenames import LEROBOT_INFO, RLDS_INFO, RUN
from tests.conftest import REPOSITORY

BASE = REPOSITORY / "checkpoints" / "openvla-tiny"


def run(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_mp4_and_actions_become_a_data_set(tmp_path: Path) -> None:
    action = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in/a.npz", action=action, instruction="push")
    with av.open(str(tmp_path / "in/a.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=5)
        stream.width = stream.height = 64
        for level in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * level, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    said = run(
        "examples/own_data.py",
        "--output",
        tmp_path,
        "--dataset_name",
        "mine",
        "--recordings",
        tmp_path / "in",
        "--fps",
        5,
    )
    assert "doctor.py" in said and "finetune.py" in said
    cache = open_cache(tmp_path, "mine", cache_dir=tmp_path / "cache")
    assert (np.load(cache.folder / "steps.npz")["action"] == action).all()
    assert (cache.fps, cache.instruction(0), cache.has_wrist, cache.state) == (5, "push", False, None)
    np.savez(tmp_path / "in/a.npz", action=action[:4], instruction="push")
    done = subprocess.run(
        [sys.executable, "examples/own_data.py", "--output", tmp_path, "--dataset_name", "other", "--recordings", tmp_path / "in"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "6 frames and 4 actions" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("action_dim", [14])
def test_another_width_trains_validates_and_acts(tmp_path: Path, action_dim: int) -> None:
    where = ("--data_root_dir", tmp_path, "--dataset_name", "arms", "--cache_dir", tmp_path / "cache")
    run("examples/own_data.py", "--output", tmp_path, "--dataset_name", "arms", "--action_dim", action_dim)
    look = run("doctor.py", "--simulator", False, *where, "--page_dir", tmp_path / "page")
    assert "all checks passed" in look
    small = (
        "--batch_size",
        2,
        "--max_steps",
        2,
        "--save_steps",
        2,
        "--val_steps",
        2,
        "--val_share",
        0.2,
        "--num_workers",
        0,
    )
    run("finetune.py", "--vla_path", BASE, *where, *small, "--lora_rank", 4, "--run_root_dir", tmp_path / "runs")
    (run_folder,) = (tmp_path / "runs").iterdir()
    assert "val_loss" in (run_folder / "metrics.jsonl").read_text()
    from prismatic.checkpoint import load_policy

    run(
        "eval.py", "--open_loop", True, "--open_loop_frames", 3, "--pretrained_checkpoint", run_folder / "latest", *where,
        "--local_log_dir", tmp_path / "rollouts",
    )  # fmt: skip
    (record,) = (tmp_path / "rollouts").rglob(RUN)
    asked = json.loads(record.read_text())["record"]["open_loop"]
    assert asked["dataset"] == "arms" and {split["frames"] for split in asked["splits"].values()} == {3}
    for split in asked["splits"].values():
        assert len(split["policy"]["per_dimension"]["l1_loss"]) == action_dim
    policy = load_policy(run_folder / "latest", device="cpu")
    frame = np.zeros((224, 224, 3), dtype=np.uint8)
    answer = policy(frame, "push the block to the left", wrist=frame)
    assert answer.shape == (action_dim,) and np.isfinite(answer).all()


@pytest.mark.slow
def test_rlds_is_the_same_data_set(tmp_path: Path) -> None:
    caches = []
    for form, marker in (("lerobot", LEROBOT_INFO), ("rlds", f"1.0.0/{RLDS_INFO}")):
        run(
            "examples/own_data.py",
            "--output",
            tmp_path / form,
            "--dataset_name",
            "mine",
            "--format",
            form,
            "--episodes",
            3,
        )
        assert (tmp_path / form / "mine" / marker).is_file() and [*(tmp_path / form).iterdir()] == [
            tmp_path / form / "mine"
        ]
        caches.append(open_cache(tmp_path / form, "mine", cache_dir=tmp_path / "cache" / form))
    one, other = (  # in an order that both formats share
        sorted(
            (cache.instruction(frame), cache.actions[frame].tobytes(), cache.image_bytes(frame))
            for frame in range(len(cache))
        )
        for cache in caches
    )
    assert one == other
