"""Dtypes of a training run and what makes it fit, through the training script: what it prints, what it refuses, what changes nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune
from config import FinetuneConfig
from prismatic.errors import ConfigError
from prismatic.models.lora import lora_layers
from prismatic.training import memory
from prismatic.training.distributed import SINGLE_PROCESS, Ranks
from prismatic.training.model import build_training_model
from tests.drawn_run import SMALL, config, rows

pytest_plugins = ["tests.drawn_run"]


@pytest.fixture
def cfg(place: Path, tmp_path: Path) -> FinetuneConfig:
    """A run with its memory plan."""
    return config(place, tmp_path)


def test_dtypes(cfg: FinetuneConfig, place: Path) -> None:
    cfg = dataclasses.replace(cfg, lora_dtype="bfloat16", use_quantization=True)
    options = finetune.options_of(cfg)
    vla = build_training_model(place / "base", None, SMALL, options, checkpointing=True, ranks=SINGLE_PROCESS)
    trained = [parameter for parameter in vla.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.bfloat16}
    head: Any = vla.language_model.lm_head
    assert head.base_layer.weight.dtype == torch.float32
    assert any(layer.base_layer.weight.dtype == torch.uint8 for _, layer in lora_layers(vla))
    on_gpu = Ranks(device="cuda")
    assert options.precision(on_gpu).base_dtype == torch.bfloat16 and not options.in_bfloat16(on_gpu)
    whole = dataclasses.replace(options, use_lora=False)
    assert whole.precision(on_gpu).base_dtype == torch.float32 and whole.precision(on_gpu).lora_rank == 0
    assert whole.in_bfloat16(on_gpu)


def test_recomputing_on_a_packed_base_changes_nothing_and_the_plan_is_printed(
    cfg: FinetuneConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {"autocast": "bfloat16", "use_quantization": True, "optimizer": "paged_adamw_8bit", "max_steps": 2}
    cfg = dataclasses.replace(cfg, **how)
    run = finetune.main(cfg)
    text = capsys.readouterr().out
    assert "memory plan, MiB: weights" in text and "gradient_checkpointing False" in text
    forced = dataclasses.replace(cfg, gradient_checkpointing=True, run_id_note="recomputed")
    assert rows(finetune.main(forced).parent) == rows(run.parent)
    assert "gradient_checkpointing True" in capsys.readouterr().out


def test_what_cannot_fit_is_said_before_anything_is_loaded(
    cfg: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 20_000_000)
    monkeypatch.setattr("prismatic.training.model.load_vla", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match=r"this machine has 0\.0 GiB free"):
        finetune.main(cfg)
