"""The training script on a few drawn frames: it learns, what it saves acts, and a run that was stopped goes on (bit-equal: test_resume.py)."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import finetune
from config import FinetuneConfig
from prismatic.checkpoint import load_policy
from prismatic.data import rlds
from prismatic.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.drawn_episodes import drawn_episode
from tests.drawn_run import save_base


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with random weights, and a data set of four drawn episodes."""
    place = tmp_path_factory.mktemp("place")
    save_base(place)
    (place / "staged").mkdir()
    for number in range(4):
        rlds.stage_episode(place / "staged" / f"episode_{number}.npz", **drawn_episode(number))
    rlds.write_dataset(place / "staged", place / "data", "drawn")
    return place


@pytest.fixture
def cfg(place: Path, tmp_path: Path) -> FinetuneConfig:
    return FinetuneConfig(
        vla_path=str(place / "base"),
        data_root_dir=str(place / "data"),
        dataset_name="drawn",
        run_root_dir=tmp_path,
        cache_dir=place / "cache",
        batch_size=2,
        grad_accumulation_steps=2,
        lora_rank=4,
        lora_dropout=0.1,
        max_steps=4,
        save_steps=2,
        num_workers=0,
        log_steps=1,
    )


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def flags(cfg: FinetuneConfig) -> list[str]:
    """A run's options as its command line."""
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name != "augment_order"}
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def test_the_base_s_statistics_keep_the_meaning_of_its_tokens(cfg: FinetuneConfig, place: Path, tmp_path: Path) -> None:
    wide = {"q01": [-4.0] * 7, "q99": [4.0] * 7, "min": [-5.0] * 7, "max": [5.0] * 7, "mask": [True] * 6 + [False]}
    base = shutil.copytree(place / "base", tmp_path / "wide")
    (base / "dataset_statistics.json").write_text(json.dumps({"elsewhere": {"action": wide}}))
    kept = dataclasses.replace(cfg, vla_path=str(base), max_steps=1, action_statistics="base")
    adapter = finetune.main(dataclasses.replace(kept, run_root_dir=tmp_path / "kept"))
    assert json.loads((adapter / "dataset_statistics.json").read_text()) == {"drawn": {"action": wide}}
    frame = np.zeros((64, 64, 3), np.uint8)
    assert load_policy(adapter)(frame, "put block 1 on the plate", frame).shape == (7,)
    own = finetune.main(dataclasses.replace(kept, action_statistics="dataset", run_root_dir=tmp_path / "own"))
    assert losses(own.parent) != losses(adapter.parent)  # other tokens
    with pytest.raises(ConfigError, match="statistics"):
        finetune.main(dataclasses.replace(cfg, action_statistics="base"))  # this base has none


def test_an_adapter_acts_and_knows_its_base(cfg: FinetuneConfig, place: Path) -> None:
    adapter = finetune.main(dataclasses.replace(cfg, max_steps=2))
    frame = np.zeros((256, 256, 3), np.uint8)
    policy = load_policy(adapter, device="cpu")
    action = policy(frame, "put block 1 on the plate", wrist=frame)
    assert action.shape == (7,) and action.dtype == np.float32 and np.isfinite(action).all()
    np.testing.assert_array_equal(
        load_policy(place / "base", adapter, device="cpu")(frame, "put block 1 on the plate", frame), action
    )
    assert policy.processor.config.unnorm_key == "drawn" and policy.processor.config.center_crop
    with pytest.raises(ConfigError, match="contradicts"):
        load_policy(adapter, center_crop=False, device="cpu")


def test_all_of_a_small_model_can_be_trained(cfg: FinetuneConfig) -> None:
    whole = dataclasses.replace(cfg, use_lora=False, learning_rate=1e-3, image_aug=False, max_steps=30, save_steps=30)
    folder = finetune.main(whole)
    history = losses(folder.parent)
    assert np.mean(history[-5:]) < 0.5 * history[0]
    policy = load_policy(folder, device="cpu")
    assert not policy.processor.config.center_crop
    assert not (folder / "adapter_config.json").exists()


def test_ctrl_c_saves_and_the_same_command_goes_on(cfg: FinetuneConfig) -> None:
    command = [sys.executable, "finetune.py", *flags(cfg), "--max_steps", "100000", "--save_steps", "100000"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    run = cfg.run_root_dir / cfg.run_name
    deadline = time.monotonic() + 180
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in output
    (saved,) = run.glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    finetune.main(dataclasses.replace(cfg, max_steps=step + 1))
    assert (run / f"step-{step + 1:06d}").is_dir()


def test_torchrun_starts_it(cfg: FinetuneConfig) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "finetune.py", *flags(cfg), "--max_steps", "1"],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    assert "8 samples each, on cpu x 2" in done.stdout
    assert (cfg.run_root_dir / cfg.run_name / "latest" / "adapter_model.safetensors").is_file()


def test_what_changed_is_named(cfg: FinetuneConfig, place: Path, tmp_path: Path) -> None:
    finetune.main(dataclasses.replace(cfg, max_steps=1))
    rlds.stage_episode(place / "staged" / "episode_9.npz", **drawn_episode(5))
    try:
        rlds.write_dataset(place / "staged", tmp_path / "data", "drawn")
    finally:
        (place / "staged" / "episode_9.npz").unlink()
    for changes, sentence in (
        ({"seed": 8}, r"begun with --seed 7, not 8.*--run_id_note"),
        ({"resume": "never"}, "--resume is never"),
        ({"data_root_dir": str(tmp_path / "data")}, "begun with --data"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            finetune.main(dataclasses.replace(cfg, **changes))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("batch_size", 0, "--batch_size 0"), ("augment_order", ("random_resize_crop",), "random_resize_crop"),
        ("dataset_name", "missing", "drawn"), ("dataset_name", "drawn:much", "is no weight"),
        ("data_root_dir", "/nowhere/at/all", "/nowhere/at/all"), ("vla_path", "/nowhere/at/all", "no folder, and no hub id"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(cfg: FinetuneConfig, field: str, value: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        finetune.main(dataclasses.replace(cfg, **{field: value}))
    assert "\n" not in str(caught.value)
