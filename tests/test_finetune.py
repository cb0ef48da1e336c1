"""The training script: what it saves acts, all of a small model can learn, OpenVLA-OFT's heads learn; what can't work is one sentence."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import finetune
from config import FinetuneConfig
from prismatic.augmentation import drawing
from prismatic.checkpoint import load_policy
from prismatic.data.examples import Examples, draw_batches
from prismatic.data.frames import Mixture
from prismatic.data.lerobot_writer import write_dataset
from prismatic.data.loader import batches
from prismatic.errors import ConfigError
from prismatic.image import AUGMENTATIONS
from prismatic.models.vla import VLAConfig
from prismatic.processor import Processor, ProcessorConfig
from prismatic.training import setup
from prismatic.training.distributed import SINGLE_PROCESS, Ranks
from tests.conftest import REPOSITORY
from tests.drawn_cache import write_cache
from tests.drawn_checkpoint import ENTRY, tokenizer
from tests.drawn_episodes import drawn_episode
from tests.drawn_run import SMALL, drawn_mixture, rows, run_folder

pytest_plugins = ["tests.drawn_run"]

FRAME = np.zeros((64, 64, 3), np.uint8)
TOLD = (FRAME, "put block 1 on the plate", FRAME)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


def test_missing_data_is_said_before_weights_are_fetched(
    cfg: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(setup, "resolve", lambda *_: pytest.fail("weights were fetched"))
    for root in ("/nowhere/at/all", "./nowhere", "../nowhere", "here/nowhere"):
        with pytest.raises(ConfigError, match="nowhere"):
            finetune.main(dataclasses.replace(cfg, data_root_dir=root))


def test_an_adapter_acts_and_knows_its_base_and_its_statistics(
    cfg: FinetuneConfig, place: Path, finished: Path, tmp_path: Path
) -> None:
    policy = load_policy(finished / "latest", device="cpu")
    action = policy(*TOLD)
    assert action.shape == (7,) and action.dtype == np.float32 and np.isfinite(action).all()
    np.testing.assert_array_equal(load_policy(place / "base", finished, device="cpu")(*TOLD), action)
    assert policy.processor.config.unnorm_key == "drawn" and policy.processor.config.center_crop
    with pytest.raises(ConfigError, match="contradicts"):
        load_policy(finished, center_crop=False, device="cpu")
    kept = finetune.main(dataclasses.replace(cfg, max_steps=1, action_statistics="base"))
    assert json.loads((kept / "dataset_statistics.json").read_text()) == {"drawn": ENTRY}
    assert load_policy(kept)(*TOLD).shape == (7,)
    assert losses(kept.parent) != losses(finished)  # its tokens keep the base's meaning
    base = Path(shutil.copytree(place / "base", tmp_path / "none"))
    other = {
        name: part | {"q99": [9.0] * len(part["q99"])} if name == "action" else part for name, part in ENTRY.items()
    }
    (base / "dataset_statistics.json").write_text(json.dumps({"other": other, "demo": ENTRY}))
    for name in ("drawn", "again"):
        shutil.copytree(place / "data" / "drawn", tmp_path / "data" / name)
    two = {"data_root_dir": str(tmp_path / "data"), "dataset_name": "drawn,again", "action_statistics": "base"}
    kept = finetune.main(dataclasses.replace(cfg, vla_path=str(base), max_steps=1, **two))
    # the entry that the base's processor.json names, for both; one key serves as well as the other
    assert json.loads((kept / "dataset_statistics.json").read_text()) == {"drawn": ENTRY, "again": ENTRY}
    assert load_policy(kept).processor.config.unnorm_key == "drawn"
    (base / "dataset_statistics.json").write_text("{}")
    with pytest.raises(ConfigError, match="statistics"):
        finetune.main(dataclasses.replace(cfg, vla_path=str(base), action_statistics="base"))


def test_all_of_a_small_model_can_be_trained(cfg: FinetuneConfig) -> None:
    whole = dataclasses.replace(cfg, use_lora=False, learning_rate=3e-3, image_aug=False, max_steps=40, save_steps=40)
    folder = finetune.main(whole)
    history = losses(folder.parent)
    assert np.mean(history[-5:]) < 0.5 * history[0]
    policy = load_policy(folder, device="cpu")
    assert not policy.processor.config.center_crop
    assert not (folder / "adapter_config.json").exists()


def test_an_adapter_is_no_base_to_start_from(cfg: FinetuneConfig, finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"is an adapter: merge it by python export\.py"):
        finetune.main(dataclasses.replace(cfg, vla_path=str(finished), run_id_note="on"))


def test_torchrun_starts_it(cfg: FinetuneConfig) -> None:
    cfg = dataclasses.replace(cfg, max_steps=1)
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name != "augment_order"}
    flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "finetune.py", *flags], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "8 samples each, on cpu x 2" in done.stdout
    assert "memory plan" in done.stdout
    for file in ("latest/adapter_model.safetensors", "curves.png", "first_batch.png"):
        assert (run_folder(cfg) / file).is_file()


@pytest.fixture
def oft(cfg: FinetuneConfig) -> FinetuneConfig:
    """OpenVLA-OFT's way with two arms: chunks of two actions of 14 numbers, two images, the robot's state."""
    return dataclasses.replace(
        cfg, dataset_name="arms", action_head="l1", num_actions_chunk=2, num_images_in_input=2, use_proprio=True, lora_dropout=0.1, max_steps=3,
        val_share=0.5, val_steps=3, lr_decay_step=2,
    )  # fmt: skip


def test_chunks_by_regression_learn_and_resume(oft: FinetuneConfig) -> None:
    whole = finetune.main(dataclasses.replace(oft, run_id_note="whole"))
    finetune.main(dataclasses.replace(oft, run_id_note="halves", max_steps=2, val_steps=0))
    halves = finetune.main(dataclasses.replace(oft, run_id_note="halves"))
    history = rows(whole.parent)
    assert rows(halves.parent) == history and [row["step"] for row in history] == [1, 2, 3]
    assert [row["learning_rate"] for row in history] == pytest.approx([5e-4, 5e-4, 5e-5])
    for name in ("adapter_model.safetensors", "proprio_projector.safetensors", "action_head.safetensors"):
        mine, theirs, before = (load_file(folder / name) for folder in (whole, halves, whole.parent / "step-000002"))
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items()), name
        assert any(not torch.equal(tensor, before[key]) for key, tensor in mine.items()), name
    check_chunks(whole, history[-1], "l1")


def test_chunks_of_tokens_learn(oft: FinetuneConfig) -> None:
    folder = finetune.main(dataclasses.replace(oft, action_head="parallel", max_steps=1))
    assert not (folder / "action_head.safetensors").exists()
    check_chunks(folder, rows(folder.parent)[-1], "parallel")


def check_chunks(folder: Path, row: dict[str, float], head: str) -> None:
    numbers = {"val_loss", "val_curr_action_l1_loss", "val_next_actions_l1_loss", "val_l1_loss_per_dimension_13"}
    assert numbers <= set(row) and ("action_accuracy" in row) == (head == "parallel")
    processor = json.loads((folder / "processor.json").read_text())
    assert (processor["action_head"], processor["num_actions_chunk"], processor["proprio_dim"]) == (head, 2, 8)


def examples_of(place: Path, head: str, augmentations: Sequence[str]) -> Examples:
    mixture = drawn_mixture(place, seed=0)
    config = ProcessorConfig.for_model(SMALL, unnorm_key="drawn", center_crop=True)
    config = dataclasses.replace(config, action_head=head)  # type: ignore[arg-type]
    processor = Processor(config, tokenizer(), mixture.statistics)
    return Examples(mixture, processor, augment=drawing(augmentations), seed=0)


def test_each_camera_of_a_chunked_head_has_augmentations_of_its_own(place: Path) -> None:
    for head, same in (("l1", False), ("tokens", True)):
        first, second = examples_of(place, head, ["random_hue"])._augmentations(5)
        assert (first == second) == same


def test_the_number_of_loader_processes_changes_nothing(place: Path) -> None:
    examples = examples_of(place, "l1", AUGMENTATIONS)
    alone, helped = (
        itertools.islice(batches(examples, draw_batches(batch_size=2, first=1), num_workers=n, pin_memory=False), 3)
        for n in (0, 2)
    )
    for mine, theirs in zip(alone, helped, strict=True):
        assert torch.equal(mine.pixel_values, theirs.pixel_values) and torch.equal(mine.input_ids, theirs.input_ids)


def test_a_warm_up_longer_than_the_run_is_said(cfg: FinetuneConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for warmup, said in ((11, True), (10, False)):
        options = finetune.options_of(dataclasses.replace(cfg, max_steps=10, warmup_steps=warmup))
        setup.check_flags(options, SINGLE_PROCESS)
        assert ("--warmup_steps" in capsys.readouterr().out) == said


def test_moments_that_cannot_be_split_are_refused_where_they_would_be(cfg: FinetuneConfig) -> None:
    for size, shard in ((2, True), (1, True), (2, False)):
        split = dataclasses.replace(cfg, use_lora=False, shard=shard, optimizer="paged_adamw_8bit")
        with pytest.raises(ConfigError, match="give adamw") if size > 1 and shard else contextlib.nullcontext():
            setup.check_flags(finetune.options_of(split), Ranks(0, size))


def test_other_states_or_another_split_are_other_data(tmp_path: Path) -> None:
    """Where a model reads states: the cache's fingerprint is of images, words and actions."""
    plain = [drawn_episode(n) for n in range(3)]
    moved = [episode | {"state": episode["state"] + 1} for episode in plain]
    reads, blind = VLAConfig(action_head="l1", num_actions_chunk=2, proprio_dim=8), VLAConfig()

    def identity(name: str, episodes: list, config: VLAConfig, **how: Any) -> dict[str, Any]:
        cache = write_cache(tmp_path / name, episodes, **how)
        mixture = Mixture([cache], seed=0)
        return setup.Task(tmp_path, "base", config, mixture, None).identity  # pyright: ignore[reportArgumentType]

    same = identity("a", plain, reads)
    assert same == identity("b", plain, reads)
    assert same != identity("c", moved, reads) and same != identity("d", plain, reads, train_episodes=1)
    assert identity("e", plain, blind) == identity("f", moved, blind)


BAD: dict[str, tuple[dict, str]] = {
    "batch": ({"batch_size": 0}, "--batch_size 0"),
    "augmentation": ({"augment_order": ("random_resize_crop",)}, "random_resize_crop"),
    "no data set": ({"dataset_name": "missing"}, "drawn"),
    "weight": ({"dataset_name": "drawn:much"}, "is no weight"),
    "no data": ({"data_root_dir": "/nowhere/at/all"}, "/nowhere/at/all"),
    "no base": ({"vla_path": "/nowhere/at/all"}, "no folder, and no hub id"),
    "sharded adapter": ({"shard": True}, "--use_lora False"),
    "packed and trained": ({"use_quantization": True, "use_lora": False}, "--use_quantization packs a base that isn't trained"),
    "chunk of tokens": ({"num_actions_chunk": 2, "action_head": "tokens"}, "action_head tokens answers with one action.* num_actions_chunk 2"),
    "long chunk": ({"num_actions_chunk": 40, "action_head": "l1"}, "40 steps"),
    "another seed": ({"seed": 8}, r"begun with --seed 7, not 8.*--run_id_note"),
    "run that exists": ({"resume": "never"}, "--resume is never"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input_is_one_sentence(begun: FinetuneConfig, mistake: str) -> None:
    changes, sentence = BAD[mistake]
    with pytest.raises(ConfigError, match=sentence) as caught:
        finetune.main(dataclasses.replace(begun, **changes))
    assert "\n" not in str(caught.value)


def test_data_without_a_state_is_named(cfg: FinetuneConfig, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = setup.open_mixture

    def without_state(*names: str, **how: object) -> object:
        mixture = opened(*names, **how)  # type: ignore[arg-type]
        mixture.caches[0].state = None
        return mixture

    monkeypatch.setattr(setup, "open_mixture", without_state)
    with pytest.raises(
        ConfigError, match="no robot state: name it by --data_keys state=…, or give --use_proprio False"
    ):
        finetune.main(dataclasses.replace(cfg, action_head="l1", num_actions_chunk=2, use_proprio=True))


def test_a_full_shared_memory_is_named_before_anything_starts(
    cfg: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    with pytest.raises(ConfigError, match=r"/dev/shm has 1 MB free, .*--num_workers 0"):
        finetune.main(dataclasses.replace(cfg, num_workers=8))


def test_a_run_goes_on_where_its_base_lies_now_but_not_with_other_data(
    begun: FinetuneConfig, place: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(place / "base", tmp_path / "elsewhere" / "base")
    finetune.main(dataclasses.replace(begun, vla_path=f"{moved}/", data_root_dir=f"{place}/data/", max_steps=2))
    assert rows(run_folder(begun))[-1]["step"] == 2
    staged = Path(shutil.copytree(place / "staged" / "drawn", tmp_path / "staged"))
    (staged / "episode_0.npz").unlink()
    write_dataset(staged, tmp_path / "data", "drawn")
    other = dataclasses.replace(begun, data_root_dir=str(tmp_path / "data"), cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match="begun with other data"):
        finetune.main(other)
