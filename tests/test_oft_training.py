"""OpenVLA-OFT through the training script: chunks by regression and by tokens, two images, state, any action width; stopped and resumed."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import finetune
from config import FinetuneConfig
from prismatic.augmentation import drawing
from prismatic.data.examples import DrawBatches, Examples
from prismatic.data.frames import FrameCache, Mixture
from prismatic.data.loader import batches
from prismatic.errors import ConfigError
from prismatic.image import AUGMENTATIONS
from prismatic.models.tiny import TINY, tiny_tokenizer
from prismatic.processor import Processor, ProcessorConfig
from prismatic.training import setup
from tests.drawn_cache import write_cache
from tests.drawn_episodes import drawn_episode
from tests.drawn_run import rows, run_folder

pytest_plugins = ["tests.drawn_run"]

ARMS, CHUNK = 14, 2  # numbers of a bimanual robot's action


@pytest.fixture
def two_arms(tmp_path: Path) -> FrameCache:
    episodes = [drawn_episode(number) for number in range(5)]
    for episode in episodes:
        episode["action"] = np.concatenate([episode["action"], episode["action"][::-1]], axis=1)
    return write_cache(tmp_path / "two_arms", episodes)


@pytest.fixture
def oft(cfg: FinetuneConfig, two_arms: FrameCache, monkeypatch: pytest.MonkeyPatch) -> FinetuneConfig:
    names = ("seed", "val_share", "num_actions_chunk")
    opened = lambda root, name, **how: Mixture([two_arms], **{name: how[name] for name in names})  # noqa: E731
    monkeypatch.setattr(setup, "open_mixture", opened)
    return dataclasses.replace(
        cfg, action_head="l1", num_actions_chunk=CHUNK, num_images_in_input=2, use_proprio=True, lora_dropout=0.1, max_steps=3,
        val_share=0.5, val_steps=3, lr_decay_step=2,
    )  # fmt: skip


@pytest.mark.parametrize("head", ["l1", "parallel"])
def test_train_two_and_resume_to_three(oft: FinetuneConfig, head: str) -> None:
    oft = dataclasses.replace(oft, action_head=head)  # type: ignore[arg-type]
    whole = finetune.main(dataclasses.replace(oft, run_id_note="whole"))
    finetune.main(dataclasses.replace(oft, run_id_note="halves", max_steps=2, val_steps=0))
    halves = finetune.main(dataclasses.replace(oft, run_id_note="halves"))
    history = rows(whole.parent)
    assert rows(halves.parent) == history and [row["step"] for row in history] == [1, 2, 3]
    assert [row["learning_rate"] for row in history] == pytest.approx([5e-4, 5e-4, 5e-5])
    names = [
        "adapter_model.safetensors",
        "proprio_projector.safetensors",
        *["action_head.safetensors"] * (head == "l1"),
    ]
    for name in names:
        mine, theirs = load_file(whole / name), load_file(halves / name)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items()), name
    numbers = {
        "val_loss",
        "val_curr_action_l1_loss",
        "val_next_actions_l1_loss",
        f"val_l1_loss_per_dimension_{ARMS - 1}",
    }
    assert numbers <= set(history[-1]) and ("action_accuracy" in history[0]) == (head == "parallel")
    processor = json.loads((whole / "processor.json").read_text())
    assert (processor["action_head"], processor["num_actions_chunk"], processor["proprio_dim"]) == (head, CHUNK, 8)


def test_head_and_projector_learn_and_begin_by_the_seed(oft: FinetuneConfig) -> None:
    oft = dataclasses.replace(oft, max_steps=1, val_steps=0)
    one, again, other = (
        finetune.main(dataclasses.replace(oft, run_id_note=note, seed=seed))
        for note, seed in (("one", 7), ("again", 7), ("other", 8))
    )
    for name in ("action_head.safetensors", "proprio_projector.safetensors"):
        first, second, third = (load_file(folder / name) for folder in (one, again, other))
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
        assert any(not torch.equal(tensor, third[key]) for key, tensor in first.items())


def test_each_camera_has_augmentations_of_its_own(two_arms: FrameCache) -> None:
    mixture = Mixture([two_arms], seed=0, num_actions_chunk=CHUNK)
    for head, same in (("l1", False), ("tokens", True)):
        config = ProcessorConfig.for_model(TINY, unnorm_key="drawn", center_crop=True)
        config = dataclasses.replace(config, action_head=head, num_images_in_input=2)  # type: ignore[arg-type]
        processor = Processor(config, tiny_tokenizer(["put"]), mixture.statistics)
        first, second = Examples(mixture, processor, augment=drawing(["random_hue"]), seed=0)._augmentations(5)
        assert (first == second) == same


def test_the_number_of_loader_processes_changes_nothing(two_arms: FrameCache) -> None:
    mixture = Mixture([two_arms], seed=0, num_actions_chunk=CHUNK)
    config = ProcessorConfig.for_model(TINY, unnorm_key="drawn", center_crop=True)
    config = dataclasses.replace(config, action_head="l1", num_actions_chunk=CHUNK, num_images_in_input=2)
    examples = Examples(
        mixture, Processor(config, tiny_tokenizer(["put"]), mixture.statistics), augment=drawing(AUGMENTATIONS), seed=0
    )
    alone, helped = (
        list(
            itertools.islice(
                batches(examples, DrawBatches(batch_size=2, first=1), num_workers=count, pin_memory=False), 3
            )
        )
        for count in (0, 2)
    )
    for mine, theirs in zip(alone, helped, strict=True):
        assert torch.equal(mine.pixel_values, theirs.pixel_values) and torch.equal(mine.input_ids, theirs.input_ids)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"action_head": "tokens"}, "--num_actions_chunk 2: --action_head tokens"),
        ({"num_actions_chunk": 40}, "40 steps"),
    ],
)
def test_what_does_not_fit_is_one_sentence(oft: FinetuneConfig, options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        finetune.main(dataclasses.replace(oft, **options))
    assert not run_folder(oft).exists() or not list(run_folder(oft).glob("step-*"))


def test_data_without_a_state_is_named(oft: FinetuneConfig, two_arms: FrameCache) -> None:
    two_arms.state = None
    with pytest.raises(ConfigError, match="no robot state: give --use_proprio False"):
        finetune.main(oft)


def test_a_full_shared_memory_is_named_before_anything_starts(
    oft: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    with pytest.raises(ConfigError, match=r"/dev/shm has 1 MB free, .*--num_workers 0"):
        finetune.main(dataclasses.replace(oft, num_workers=2))


def test_a_run_goes_on_where_its_base_lies_now(cfg: FinetuneConfig, place: Path) -> None:
    finetune.main(dataclasses.replace(cfg, max_steps=1))
    (place / "elsewhere").mkdir(exist_ok=True)
    moved = (place / "base").rename(place / "elsewhere" / "base")
    try:
        finetune.main(dataclasses.replace(cfg, vla_path=f"{moved}/", data_root_dir=f"{place}/", max_steps=2))
    finally:
        moved.rename(place / "base")
    assert rows(run_folder(cfg))[-1]["step"] == 2
