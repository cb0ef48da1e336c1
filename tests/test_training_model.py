"""Number formats and passes of a training run, through the training script: what it prints, what it refuses, what changes nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finetune
from config import FinetuneConfig
from prismatic.errors import ConfigError
from prismatic.models.lora import lora_layers
from prismatic.training import memory
from prismatic.training.model import ModelOptions, build_training_model
from tests.test_finetune import cfg, every_step_is_logged, losses, place  # noqa: F401  (fixtures)

OPTIONS = ModelOptions(
    use_lora=True,
    lora_rank=4,
    lora_dropout=0.0,
    lora_dtype="float32",
    use_quantization=False,
    autocast=False,
    gradient_checkpointing="auto",
    optimizer="adamw",
    compile=False,
    shard=False,
)


def test_formats(place: Path) -> None:  # noqa: F811
    options = dataclasses.replace(OPTIONS, lora_dtype="bfloat16", use_quantization=True)
    vla = build_training_model(place / "base", None, options, checkpointing=True, device="cpu")
    trained = [parameter for parameter in vla.parameters() if parameter.requires_grad]
    assert len(trained) == 126 and {parameter.dtype for parameter in trained} == {torch.bfloat16}
    head: Any = vla.language_model.lm_head
    assert head.base_layer.weight.dtype == torch.float32
    assert any(layer.base_layer.weight.dtype == torch.uint8 for _, layer in lora_layers(vla))
    assert OPTIONS.precision("cuda").base_dtype == torch.bfloat16
    whole = dataclasses.replace(OPTIONS, use_lora=False)
    assert whole.precision("cuda").base_dtype == torch.float32 and whole.precision("cuda").lora_rank == 0


def test_a_run_on_a_packed_base_resumes_bit_equal(cfg: FinetuneConfig) -> None:  # noqa: F811
    cfg = dataclasses.replace(
        cfg, use_quantization=True, optimizer="paged_adamw_8bit", gradient_checkpointing=True, max_steps=2, save_steps=1
    )
    whole = finetune.main(dataclasses.replace(cfg, run_id_note="whole"))
    finetune.main(dataclasses.replace(cfg, run_id_note="halves", max_steps=1))
    halves = finetune.main(dataclasses.replace(cfg, run_id_note="halves"))
    assert losses(whole.parent) == losses(halves.parent) and len(losses(whole.parent)) == 2
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (whole, halves))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_the_plan_is_printed_and_recomputing_changes_nothing(
    cfg: FinetuneConfig,  # noqa: F811
    autocast: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = dataclasses.replace(cfg, max_steps=2, autocast=autocast, run_id_note=autocast)
    run = finetune.main(cfg)
    text = capsys.readouterr().out
    assert "memory plan, MiB: weights" in text and "gradient_checkpointing False" in text
    forced = dataclasses.replace(cfg, gradient_checkpointing=True, run_id_note=f"recomputed-{autocast}")
    assert losses(finetune.main(forced).parent) == losses(run.parent)
    assert "gradient_checkpointing True" in capsys.readouterr().out


def test_what_cannot_fit_is_said_before_anything_is_loaded(
    cfg: FinetuneConfig,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 20_000_000)
    monkeypatch.setattr("prismatic.training.model.load_vla", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match=r"this machine has 0\.0 GiB free"):
        finetune.main(cfg)


def test_packing_what_is_trained_is_refused(cfg: FinetuneConfig) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="--use_quantization packs a base that isn't trained"):
        finetune.main(dataclasses.replace(cfg, use_quantization=True, use_lora=False))
