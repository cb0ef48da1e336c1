"""examples/own_data.py, from recordings to a policy that answers, with one arm and with two."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from collect import CollectConfig, open_stage
from examples import own_data
from examples.own_data import OwnDataConfig
from prismatic.checkpoint import load_policy
from prismatic.data.mixture import open_cache
from prismatic.errors import ConfigError
from prismatic.filenames import RLDS_INFO, RUN
from tests.conftest import REPOSITORY

BASE = REPOSITORY / "checkpoints" / "openvla-tiny"


def run(script: str, *options: object) -> str:
    done = subprocess.run([sys.executable, script, *map(str, options)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def record(path: Path, **arrays: Any) -> None:
    """An npz, and a video of 6 frames beside it."""
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)
    with av.open(str(path.with_suffix(".mp4")), "w") as container:
        stream: Any = container.add_stream("libx264", rate=5)
        stream.width = stream.height = 64
        for level in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * level, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


ACTION = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)


def test_mp4_and_actions_become_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "in/a.npz", action=ACTION, instruction="push")
    own_data.main(OwnDataConfig(tmp_path, "mine", recordings=tmp_path / "in", fps=5))
    said = capsys.readouterr().out
    assert "doctor.py" in said and "finetune.py" in said
    cache = open_cache(tmp_path, "mine", cache_dir=tmp_path / "cache")
    assert (np.load(cache.folder / "steps.npz")["action"] == ACTION).all()
    assert (cache.fps, cache.instruction(0), cache.has_wrist, cache.state) == (5, "push", False, None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda npz: npz.with_suffix(".mp4").unlink(), r"a\.mp4 can't be decoded .*needs its video"),
        (lambda npz: npz.with_suffix(".mp4").write_bytes(b"nothing"), r"a\.mp4 can't be decoded"),
        (lambda npz: npz.unlink(), r"holds no <name>\.npz"),
        (lambda npz: npz.write_bytes(npz.read_bytes()[:200]), r"a\.npz can't be read"),
        (lambda npz: np.savez(npz, instruction="push"), r"a\.npz has no action, only instruction"),
        (lambda npz: np.savez(npz, action=ACTION), r"a\.npz has no instruction"),
        *(
            (
                lambda npz, said=said: np.savez(npz, action=ACTION, instruction=said),
                r"a\.npz: instruction is no single text",
            )
            for said in (["push", "pull"], 3, [])
        ),
        (lambda npz: np.savez(npz, action=ACTION[:4], instruction="push"), r"recording 1: .*6 images .*\(4, 7\)"),
        (lambda npz: np.savez(npz, action=ACTION[:, 0], instruction="push"), r"recording 1: .*\(6,\)"),
        (lambda npz: np.savez(npz, action=ACTION, state=3.0, instruction="push"), r"recording 1: .*'state': \(\)"),
        (lambda npz: np.savez(npz, action=ACTION[:, :0], instruction="push"), r"recording 1: .*\(6, 0\)"),
        (
            lambda npz: record(npz.with_name("b.npz"), action=ACTION[:, :6], instruction="push"),
            r"recording 2 has .*\[6\].*the first .*\[7\]",
        ),
        (lambda npz: npz.parents[1].joinpath("out").write_text("a file"), r"cannot write .*out"),
    ],
)
def test_a_recording_that_is_not_whole_is_one_sentence(tmp_path: Path, change: Any, sentence: str) -> None:
    record(tmp_path / "in/a.npz", action=ACTION, instruction="push")
    change(tmp_path / "in/a.npz")
    with pytest.raises(ConfigError, match=sentence):
        own_data.main(OwnDataConfig(tmp_path / "out", "mine", recordings=tmp_path / "in"))
    assert not (tmp_path / "out").is_dir() or not [*(tmp_path / "out").iterdir()]


@pytest.mark.slow
def test_another_width_trains_validates_and_acts(tmp_path: Path) -> None:
    named = ("--dataset_name", "arms")
    where = ("--data_root_dir", tmp_path, *named, "--cache_dir", tmp_path / "cache")
    run("examples/own_data.py", "--output", tmp_path, *named, "--action_dim", 14)
    assert "all checks passed" in run("doctor.py", "--simulator", False, *where, "--page_dir", tmp_path / "page")
    small = "--batch_size 2 --max_steps 2 --save_steps 2 --val_steps 2 --val_share 0.2 --num_workers 0 --lora_rank 4"
    run("finetune.py", "--vla_path", BASE, *where, *small.split(), "--run_root_dir", tmp_path / "runs")
    (run_folder,) = (tmp_path / "runs").iterdir()
    assert "val_loss" in (run_folder / "metrics.jsonl").read_text()
    asked = ("--open_loop", True, "--open_loop_frames", 3, "--pretrained_checkpoint", run_folder / "latest")
    run("eval.py", *asked, *where, "--val_share", 0, "--local_log_dir", tmp_path / "rollouts")
    (answers,) = (tmp_path / "rollouts").rglob(RUN)
    found = json.loads(answers.read_text())["record"]["open_loop"]
    assert found["dataset"] == "arms"
    assert {name: split["frames"] for name, split in found["splits"].items()} == {
        "train": 3
    }  # nothing is counted as held out
    for split in found["splits"].values():
        assert len(split["policy"]["per_dimension"]["l1_loss"]) == 14
    policy = load_policy(run_folder / "latest", device="cpu")
    frame = np.zeros((224, 224, 3), dtype=np.uint8)
    answer = policy(frame, "push the block to the left", wrist=frame)
    assert answer.shape == (14,) and np.isfinite(answer).all()


@pytest.mark.slow
def test_rlds_is_written(tmp_path: Path) -> None:
    """That both formats hold the same is a test of their writers'."""
    own_data.main(OwnDataConfig(tmp_path, "mine", format="rlds", episodes=2))
    assert (tmp_path / f"mine/1.0.0/{RLDS_INFO}").is_file() and [*tmp_path.iterdir()] == [tmp_path / "mine"]


def test_it_and_collect_never_replace_each_other_s_data_set(tmp_path: Path) -> None:
    own_data.main(OwnDataConfig(tmp_path, "mine", episodes=2))
    own_data.main(OwnDataConfig(tmp_path, "mine", episodes=3))  # its own is made anew
    with pytest.raises(ConfigError, match=r"mine is there, and mine_staged with its episodes isn't"):
        open_stage(CollectConfig(data_root_dir=tmp_path, dataset_name="mine"))
    open_stage(CollectConfig(data_root_dir=tmp_path, dataset_name="collected"))
    with pytest.raises(ConfigError, match=r"collected_staged holds the episodes of a data set that collect.py made"):
        own_data.main(OwnDataConfig(tmp_path, "collected", episodes=2))


@pytest.mark.parametrize("instruction", ["push", b"push", ["push"], ["push"] * 6])
def test_one_text_in_whatever_form_is_the_instruction(instruction: Any, tmp_path: Path) -> None:
    assert own_data.said(np.array(instruction), tmp_path) == "push"
