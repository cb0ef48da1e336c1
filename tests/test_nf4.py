"""A base in 4 bits on the CPU: what is packed, that an adapter learns on it, and that the adapter serves the whole base."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prismatic.adapter import lora_state_dict, save_adapter
from prismatic.checkpoint import load_vla
from prismatic.models.checkpointing import checkpoint_activations
from prismatic.models.lora import add_lora, lora_layers
from prismatic.models.lora_dtype import cast_once, compute_in_base_dtype
from prismatic.models.nf4 import BYTES_PER_VALUE, quantised_linears
from prismatic.models.tiny import TINY, random_vla
from prismatic.training.optimizer import make_optimizer
from tests.drawn_batch import BATCH
from tests.drawn_checkpoint import drawn_processor, saved

bitsandbytes: Any = importlib.import_module("bitsandbytes")  # exports without saying so


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("place") / "base", random_vla(TINY, seed=0))


def test_linear_layers_are_packed_and_nothing_else(base: Path) -> None:
    plain, packed, packed_values = load_vla(base), load_vla(base, nf4=True), 0
    for name, module in plain.named_modules():
        now: Any = packed.get_submodule(name)
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head") and module.in_features % 64 == 0:
            assert isinstance(now, bitsandbytes.nn.Linear4bit) and now.weight.dtype == torch.uint8, name
            state = now.weight.quant_state
            assert state.quant_type == "nf4" and not state.nested
            assert now.weight.nbytes + state.absmax.nbytes == module.weight.numel() * BYTES_PER_VALUE
            unpacked = bitsandbytes.functional.dequantize_4bit(now.weight.data, state)
            assert (unpacked - module.weight).norm() < 0.1 * module.weight.norm(), name
            packed_values += module.weight.numel()
        else:
            assert type(now) is type(module), name
            for mine, theirs in zip(now.parameters(False), module.parameters(False), strict=True):
                assert torch.equal(mine, theirs)
    assert packed_values == sum(linear.weight.numel() for _, linear in quantised_linears(plain, on_cpu=True))
    on_a_gpu = {name for name, _ in quantised_linears(plain, on_cpu=False)}
    assert "vision_backbone.fused_featurizer.blocks.0.mlp.fc2" in on_a_gpu and "projector.fc1" in on_a_gpu
    assert not any(name.endswith("lm_head") for name in on_a_gpu)


def test_an_adapter_learns_on_it_and_loads_on_the_whole_base(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vla = checkpoint_activations(compute_in_base_dtype(add_lora(load_vla(base, nf4=True), rank=8).train()))
    layers = {type(layer).__name__ for _, layer in lora_layers(vla)}
    assert layers == {"AdaptedLinear4bit", "AdaptedLinear", "Conv2d"}
    trained = [parameter for parameter in vla.parameters() if parameter.requires_grad]
    optimizer = make_optimizer("paged_adamw_8bit", trained, learning_rate=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(8):
        with cast_once(vla):
            losses.append(vla(**BATCH).loss)
            losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1].item() < 0.8 * losses[0].item()
    processor = drawn_processor(base_model="base")
    save_adapter(tmp_path / "a", vla, processor=processor, statistics=processor.statistics, options={})
    whole, resumed = load_vla(base, tmp_path / "a"), load_vla(base, tmp_path / "a", nf4=True)
    mine, theirs = lora_state_dict(vla), lora_state_dict(whole)
    assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    with torch.no_grad():
        last, unpacked = vla(**BATCH).loss, whole(**BATCH).loss
        assert torch.equal(resumed(**BATCH).loss, last)
    assert unpacked.item() == pytest.approx(last.item(), rel=0.1) and unpacked.item() < 0.9 * losses[0].item()


def test_selective_recomputing_keeps_packed_products(base: Path) -> None:
    class Count(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.made += "bitsandbytes.gemm_4bit" in str(func)
            return func(*args, **(kwargs or {}))

    products = {}
    for selective in (True, False):
        vla = add_lora(load_vla(base, nf4=True), rank=4).train()
        checkpoint_activations(vla, selective=selective)
        with Count() as count:
            vla(**BATCH).loss.backward()
        products[selective] = count.made
    outside = sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in vla.projector.modules())
    assert products[True] > 20 and products[False] - outside == 2 * (products[True] - outside)


def test_acting_between_steps_leaves_the_gradients(base: Path) -> None:
    """bitsandbytes repacks weights for a CPU's fast kernels when a model acts; those have no backward pass."""
    vla = load_vla(base, nf4=True)
    add_lora(vla, rank=4).eval()
    vla.generate_action_ids(BATCH["input_ids"], BATCH["pixel_values"])
    assert not any(m.support_avx512bf16_for_cpu for m in vla.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
    vla.train()(**BATCH).loss.backward()
    assert sum(parameter.grad is not None for parameter in vla.parameters()) == 100
