"""Adapters of the original stack here, and ours in its form: logits, merged logits, eight steps of training, files, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prismatic.adapter import load_adapter, save_adapter
from prismatic.checkpoint import load_vla
from prismatic.errors import ConfigError
from prismatic.models import weights
from prismatic.models.lora import ADAPTER, add_lora, lora_layers
from prismatic.models.lora_weights import lora_state_dict, merge_lora
from prismatic.models.tiny import TINY, random_vla, tiny_tokenizer
from prismatic.models.vla import VLA
from prismatic.processor import Processor, ProcessorConfig
from tests.original import last_nine

PEFT_0_11_1_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_dora",
    "use_rslora",
}  # fmt: skip


@pytest.fixture(scope="module")
def arrays(numbers: Path) -> dict[str, np.ndarray]:
    return dict(np.load(numbers / "lora.npz"))


@pytest.fixture
def adapted(numbers: Path) -> VLA:
    return load_vla(numbers / "checkpoint", numbers / "lora_adapter")


def test_an_adapter_of_the_original_gives_its_logits_and_loss(
    adapted: VLA, batch: dict, arrays: dict, numbers: Path
) -> None:
    loss, logits = last_nine(adapted, batch, numbers)
    np.testing.assert_allclose(logits, arrays["logits_last9_action"], atol=3e-4)
    assert abs(loss - arrays["loss_adapter"]) < 2e-4


def test_merging_gives_the_originals_merged_model(adapted: VLA, batch: dict, arrays: dict, numbers: Path) -> None:
    plain = set(load_vla(numbers / "checkpoint").state_dict())
    merge_lora(adapted)
    assert set(adapted.state_dict()) == plain
    loss, logits = last_nine(adapted, batch, numbers)
    np.testing.assert_allclose(logits, arrays["logits_merged_last9_action"], atol=3e-4)
    assert abs(loss - arrays["loss_merged"]) < 2e-4


def test_eight_steps_of_adamw_land_where_the_originals_did(
    adapted: VLA, batch: dict, arrays: dict, numbers: Path
) -> None:
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-4, weight_decay=0.01)
    adapted.train()
    for expected_loss, expected_norm in zip(arrays["train_losses"], arrays["train_grad_norms"], strict=True):
        loss = adapted(**batch).loss
        assert loss is not None and abs(loss.item() - expected_loss) < 2e-4
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in trainable if p.grad is not None]).norm().item()
        assert norm == pytest.approx(expected_norm, rel=1e-3)
        optimizer.step()
        optimizer.zero_grad()
    state = {name: tensor.detach().numpy() for name, tensor in lora_state_dict(adapted).items()}
    for key, expected in np.load(numbers / "lora_after_8_steps.npz").items():
        name, _, rows = key.partition("@")
        mine = {"": state[name], "rows31744:32000": state[name][31744:32000], "rows::16": state[name][::16]}[rows]
        assert np.abs(mine - expected).max() < 1e-4 and np.abs(mine - expected).mean() < 1e-6, key


def test_the_start_is_the_originals() -> None:
    for rank, alpha in ((4, 4), (16, 16), (32, 16)):
        torch.manual_seed(0)
        vla = add_lora(random_vla(TINY, seed=0), rank=rank)
        assert next(lora_layers(vla))[1].lora_alpha[ADAPTER] == alpha
    torch.manual_seed(0)
    state = lora_state_dict(add_lora(random_vla(TINY, seed=0), rank=16))
    starts = torch.cat([t.flatten() for name, t in state.items() if ".lora_A." in name])
    assert starts.std().item() == pytest.approx(1 / 16, rel=0.02) and abs(starts.mean().item()) < 1e-3
    assert all((t == 0).all() for name, t in state.items() if ".lora_B." in name)


@pytest.fixture
def processor() -> Processor:
    config = ProcessorConfig.for_model(TINY, unnorm_key="demo", center_crop=True, base_model="openvla-tiny")
    entry = {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "min": [-1.0] * 7, "max": [1.0] * 7}}
    return Processor(config, tiny_tokenizer(["put it there"]), {"demo": entry})


def test_ours_has_the_files_and_fields_that_peft_0_11_1_reads(tmp_path: Path, processor: Processor) -> None:
    vla = add_lora(random_vla(TINY, seed=0), rank=4)
    for parameter in vla.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    save_adapter(tmp_path / "a", vla, processor=processor, statistics=processor.statistics, options={"lora_rank": 4})
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert set(config) == PEFT_0_11_1_FIELDS
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 4, "openvla-tiny")
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert "base_model.model.language_model.lm_head.lora_A.weight" in names
    assert "base_model.model.vision_backbone.featurizer.patch_embed.proj.lora_B.weight" in names
    assert not any("default" in name or "base_layer" in name for name in names)
    again = load_adapter(random_vla(TINY, seed=0), tmp_path / "a", dtype=torch.float32)
    for name, tensor in lora_state_dict(again).items():
        torch.testing.assert_close(tensor, names[name], rtol=0, atol=0)


def copied(numbers: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(numbers / "lora_adapter", tmp_path / "adapter"))


def test_an_adapter_of_another_kind_is_refused(numbers: Path, tmp_path: Path) -> None:
    folder = copied(numbers, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ConfigError, match="use_dora"):
        load_vla(numbers / "checkpoint", folder)


def test_an_adapter_that_does_not_fit_names_the_tensor(numbers: Path, tmp_path: Path) -> None:
    folder = copied(numbers, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(ConfigError, match=r"lora_A.*has shape"):
        load_vla(numbers / "checkpoint", folder)


def test_an_adapter_remembers_its_base(numbers: Path, tmp_path: Path) -> None:
    folder = copied(numbers, tmp_path)
    known = weights.fingerprint(weights.stored_tensors(numbers / "checkpoint"))
    config = ProcessorConfig("x", True, base_model="openvla/openvla-7b", base_fingerprint=known)
    (folder / "processor.json").write_text(config.to_json())
    load_vla(numbers / "checkpoint", folder)
    (folder / "processor.json").write_text(replace(config, base_fingerprint="0" * 16).to_json())
    with pytest.raises(ConfigError, match="trained on other weights"):
        load_vla(numbers / "checkpoint", folder)


def test_a_second_adapter_is_refused(adapted: VLA, numbers: Path) -> None:
    with pytest.raises(ConfigError, match="has an adapter already"):
        load_adapter(adapted, numbers / "lora_adapter", dtype=torch.float32)
