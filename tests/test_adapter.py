"""Adapters of peft here and ours in its form (the original's own: test_vla.py); what acts otherwise is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from prismatic.adapter import load_adapter, lora_state_dict, save_adapter
from prismatic.adapter_config import read_adapter_config
from prismatic.checkpoint import adapter_base, base_and_adapter, load_merged, load_vla
from prismatic.errors import ConfigError
from prismatic.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_WEIGHTS_BIN
from prismatic.models import weights
from prismatic.models.lora import ADAPTER, add_lora, lora_layers
from prismatic.models.tiny import TINY, random_vla
from prismatic.processor import ProcessorConfig
from tests.conftest import REPOSITORY
from tests.drawn_checkpoint import drawn_processor

BASE = REPOSITORY / "checkpoints" / "openvla-tiny"
PEFT_0_11_1_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_dora",
    "use_rslora",
}  # fmt: skip
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", "target_modules": ["q_proj", "v_proj"]}


def test_the_start_is_the_originals() -> None:
    for rank, alpha in ((4, 4), (32, 16)):
        _, layer = next(lora_layers(add_lora(random_vla(TINY, seed=0), rank=rank)))
        assert layer.lora_alpha[ADAPTER] == alpha
    torch.manual_seed(0)
    state = lora_state_dict(add_lora(random_vla(TINY, seed=0), rank=16))
    starts = torch.cat([t.flatten() for name, t in state.items() if ".lora_A." in name])
    assert starts.std().item() == pytest.approx(1 / 16, rel=0.02) and abs(starts.mean().item()) < 1e-3
    assert all((t == 0).all() for name, t in state.items() if ".lora_B." in name)


def test_ours_has_the_files_and_fields_that_peft_0_11_1_reads(tmp_path: Path) -> None:
    vla, processor = add_lora(random_vla(TINY, seed=0), rank=4), drawn_processor(base_model="openvla-tiny")
    for parameter in vla.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    save_adapter(tmp_path / "a", vla, processor=processor, statistics=processor.statistics, options={"lora_rank": 4})
    config = json.loads((tmp_path / "a" / ADAPTER_CONFIG).read_text())
    assert set(config) == PEFT_0_11_1_FIELDS
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 4, "openvla-tiny")
    names = load_file(tmp_path / "a" / ADAPTER_WEIGHTS)
    assert "base_model.model.language_model.lm_head.lora_A.weight" in names
    assert "base_model.model.vision_backbone.featurizer.patch_embed.proj.lora_B.weight" in names
    assert not any("default" in name or "base_layer" in name for name in names)
    again = load_adapter(random_vla(TINY, seed=0), tmp_path / "a", dtype=torch.float32)
    assert all(torch.equal(tensor, names[name]) for name, tensor in lora_state_dict(again).items())
    with pytest.raises(ConfigError, match="has an adapter already"):
        load_adapter(again, tmp_path / "a", dtype=torch.float32)


# Adapters that peft wrote: computed as peft computes them, or refused by the name of the field


def peft_adapter(folder: Path, *, binary: bool = False, **how: Any) -> Any:
    """Write an adapter as peft does; returns the model with it, which peft computes."""
    torch.manual_seed(1)
    model = peft.get_peft_model(load_vla(BASE), peft.LoraConfig(**LORA | how))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    if binary:  # as old versions did
        torch.save(load_file(folder / ADAPTER_WEIGHTS), folder / ADAPTER_WEIGHTS_BIN)
        (folder / ADAPTER_WEIGHTS).unlink()
    return model.eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("peft")
    peft_adapter(place)
    return place


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "adapter"))


def edit(folder: Path, **fields: Any) -> Path:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def refused(folder: Path, base: Path = BASE) -> str:
    with pytest.raises(ConfigError) as error:
        load_merged(base, folder, dtype=torch.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "how",
    [
        {}, {"target_modules": r".*language_model.*\.(q_proj|v_proj)"},
        {"target_modules": ["q_proj", "v_proj", "fc1"], "exclude_modules": "vision_backbone.*"},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}},
        {"alpha_pattern": {"v_proj": 32}}, {"init_lora_weights": "orthogonal"}, {"binary": True},
    ],
    ids=str,
)  # fmt: skip
def test_it_computes_as_peft_does(how: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft_adapter(tmp_path, **how)
    if not how:
        edit(tmp_path, lora_alpha=8.0)  # as some tools write it
    ours, plain = load_merged(BASE, tmp_path, dtype=torch.float32), load_vla(BASE)
    side, ids = plain.config.image_size, torch.arange(3, 20)[None]
    pixels = torch.randn(1, 6 * plain.config.num_images_in_input, side, side)
    with torch.no_grad():
        expected, found, untouched = (vla(ids, None, pixels).logits for vla in (theirs.base_model.model, ours, plain))
    assert (expected - untouched).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        *({"init_lora_weights": start} for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", ["pissa"], 3)),
        {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"modules_to_save": ["projector"]}, {"peft_type": "IA3"}, {"fan_in_fan_out": True},
        {"layer_replication": [[0, 2]]}, {"target_parameters": ["a"]}, {"trainable_token_indices": [1]}, {"use_qalora": True},
        {"a_field_of_a_later_version": "something"}, {"loftq_config": {"loftq_bits": 4}}, {"megatron_config": {"a": 1}},
        {"r": 0}, {"r": -1}, {"r": True}, {"r": "4"}, {"r": None}, {"lora_alpha": 0}, {"lora_alpha": "16"}, {"lora_dropout": 2},
        {"target_modules": []}, {"target_modules": [1, 2]}, {"target_modules": None}, {"target_modules": {}}, {"rank_pattern": {"(a+)+$": 4}},
        {"alpha_pattern": {"v_proj": 0}}, {"use_rslora": "yes"},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_that_is_not_built_here_is_refused_by_name(folder: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))) as error:
        read_adapter_config(edit(folder, **fields), {"a.q_proj"})
    assert "\n" not in str(error.value)


def test_tensors_and_modules_that_do_not_fit_are_named(folder: Path) -> None:
    assert "use_dora" in refused(edit(folder, use_dora=True))
    edit(folder, use_dora=False, r=8)
    sentence = refused(folder)
    assert "lora_A" in sentence and f"but {ADAPTER_CONFIG} makes it [8, " in sentence
    edit(folder, r=4)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    assert "missing" in refused(folder)
    assert ADAPTER_CONFIG in refused(edit(folder, target_modules=["no_such_module"]))
    for name in (["list"], 3, {}, True, "a\0b", "x" * 5000, "~nobody-of-that-name/x"):
        with pytest.raises(ConfigError, match=rf"{ADAPTER_CONFIG}: base_model_name_or_path"):
            adapter_base(edit(folder, base_model_name_or_path=name))


def test_a_folder_that_is_no_adapter_is_named(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=f"{ADAPTER_WEIGHTS} is missing: copy"):
        load_vla(BASE, folder)
    (folder / ADAPTER_CONFIG).unlink()
    with pytest.raises(ConfigError, match=f"has no {ADAPTER_CONFIG}"):
        base_and_adapter(BASE, folder)


def test_an_adapter_remembers_its_base(folder: Path) -> None:
    known = weights.fingerprint(weights.stored_tensors(BASE))
    config = ProcessorConfig.for_model(load_vla(BASE).config, unnorm_key="x", center_crop=True, base_fingerprint=known)
    (folder / "processor.json").write_text(config.to_json())
    load_vla(BASE, folder)
    (folder / "processor.json").write_text(replace(config, base_fingerprint="0" * 16).to_json())
    with pytest.raises(ConfigError, match="trained on other weights"):
        load_vla(BASE, folder)


def test_another_base_is_noticed_by_what_the_adapter_kept_of_its_own(tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    peft_adapter(adapter, target_modules=["q_proj", "lm_head"])
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    head = load_file(BASE / "model.safetensors")["language_model.lm_head.weight"]
    # the original stack's rounding
    tensors["base_model.model.language_model.lm_head.base_layer.weight"] = head.to(torch.bfloat16)
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    vla = load_merged(BASE, adapter, dtype=torch.float32)
    shutil.copytree(BASE, merged)
    save_file({name: tensor.contiguous() for name, tensor in vla.state_dict().items()}, merged / "model.safetensors")
    assert "merged" in refused(adapter, merged)
