"""Adapters that peft wrote, of every kind: computed as peft computes them, or refused by the name of the field. None acts wrongly."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from prismatic.checkpoint import adapter_base, load_merged, load_vla
from prismatic.errors import ConfigError
from prismatic.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_WEIGHTS_BIN
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "checkpoints" / "openvla-tiny"
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "init_lora_weights": "gaussian",
    "target_modules": ["q_proj", "v_proj"],
}
REGEX = r".*language_model.*\.(q_proj|v_proj)"


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    config = load_vla(TINY).config
    torch.manual_seed(0)
    pixels = torch.randn(1, 6 * config.num_images_in_input, config.image_size, config.image_size)
    return torch.arange(3, 20)[None], pixels


def saved(folder: Path, *, binary: bool = False, **how: Any) -> Any:
    """Write an adapter as peft does; returns the model with it, which peft computes."""
    torch.manual_seed(1)
    model = peft.get_peft_model(load_vla(TINY), peft.LoraConfig(**LORA | how))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(str(folder), safe_serialization=not binary, save_embedding_layers=False)
    return model.eval()


def edit(folder: Path, **fields: Any) -> Path:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def refused(folder: Path, base: Path = TINY) -> str:
    with pytest.raises(ConfigError) as error:
        load_merged(base, folder, dtype=torch.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"target_modules": REGEX},
        {"target_modules": ["q_proj", "v_proj", "fc1"], "exclude_modules": "vision_backbone.*"},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2}},
        {"alpha_pattern": {"v_proj": 32}},
        {"init_lora_weights": "orthogonal"},
        {"binary": True},
    ],
    ids=str,
)
def test_it_computes_as_peft_does(
    how: dict[str, Any], tmp_path: Path, inputs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    theirs = saved(tmp_path, **how)
    if how == {}:
        edit(tmp_path, lora_alpha=8.0)
    if "binary" in how:
        torch.save(load_file(tmp_path / ADAPTER_WEIGHTS), tmp_path / ADAPTER_WEIGHTS_BIN) if (
            tmp_path / ADAPTER_WEIGHTS
        ).exists() else None
        (tmp_path / ADAPTER_WEIGHTS).unlink(missing_ok=True)
    ours, plain = load_merged(TINY, tmp_path, dtype=torch.float32), load_vla(TINY)
    ids, pixels = inputs
    with torch.no_grad():
        expected = theirs.base_model.model(ids, None, pixels, all_logits=True).logits
        found = ours(ids, None, pixels, all_logits=True).logits
        untouched = plain(ids, None, pixels, all_logits=True).logits
    assert (expected - untouched).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", ["pissa"], 3])
def test_a_start_that_changes_the_base_is_refused(tmp_path: Path, start: Any) -> None:
    saved(tmp_path)
    assert "init_lora_weights" in refused(edit(tmp_path, init_lora_weights=start))


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"modules_to_save": ["projector"]}, {"peft_type": "IA3"}, {"fan_in_fan_out": True},
        {"layer_replication": [[0, 2]]}, {"target_parameters": ["a"]}, {"trainable_token_indices": [1]}, {"use_qalora": True},
        {"a_field_of_a_later_version": "something"}, {"loftq_config": {"loftq_bits": 4}}, {"megatron_config": {"a": 1}},
        {"r": 0}, {"r": -1}, {"r": True}, {"r": "4"}, {"r": None}, {"lora_alpha": 0}, {"lora_alpha": "16"}, {"lora_dropout": 2},
        {"target_modules": []}, {"target_modules": [1, 2]}, {"target_modules": None}, {"target_modules": {}}, {"rank_pattern": {"(a+)+$": 4}},
        {"alpha_pattern": {"v_proj": 0}}, {"use_rslora": "yes"},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_that_is_not_built_here_is_refused_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    saved(tmp_path)
    assert next(iter(fields)) in refused(edit(tmp_path, **fields))


def test_modules_that_are_not_there_and_lost_tensors_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    lost = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / ADAPTER_WEIGHTS)
    assert "missing" in refused(tmp_path)
    assert ADAPTER_CONFIG in refused(edit(tmp_path, target_modules=["no_such_module"]))


def test_another_base_is_noticed_by_what_the_adapter_kept_of_its_own(tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    saved(adapter, target_modules=["q_proj", "lm_head"])
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    head = load_file(TINY / "model.safetensors")["language_model.lm_head.weight"]
    tensors["base_model.model.language_model.lm_head.base_layer.weight"] = head.to(
        torch.bfloat16
    )  # the original stack's rounding
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    vla = load_merged(TINY, adapter, dtype=torch.float32)
    shutil.copytree(TINY, merged)
    save_file({name: tensor.contiguous() for name, tensor in vla.state_dict().items()}, merged / "model.safetensors")
    assert "merged" in refused(adapter, merged)


@pytest.mark.parametrize("name", [["list"], 3, {}, True])
def test_a_base_is_a_name(tmp_path: Path, name: Any) -> None:
    saved(tmp_path)
    with pytest.raises(ConfigError, match="base_model_name_or_path"):
        adapter_base(edit(tmp_path, base_model_name_or_path=name))
