"""Float32 adapters on a bfloat16 base, without a float32 copy of every activation."""

import contextlib
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prismatic.adapter import lora_state_dict, merge_lora
from prismatic.models.checkpointing import checkpoint_activations
from prismatic.models.lora import ADAPTER, add_lora
from prismatic.models.lora_dtype import AdaptedLinear, cast_once, casting_layers, compute_in_base_dtype, halves_of
from prismatic.training.live_bytes import LiveBytes
from tests.drawn_batch import BATCH, adapted

RANK = 4


def gradients(vla: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    with LiveBytes() as live:
        loss = vla(**BATCH).loss
        kept = live.now
    loss.backward()
    return {name: p.grad for name, p in vla.named_parameters() if p.grad is not None}, kept


def test_adapters_compute_in_the_bases_format_and_learn_in_their_own() -> None:
    exact, _ = gradients(adapted(RANK))
    by_peft, kept = gradients(adapted(RANK, base=torch.bfloat16))
    mine, less = gradients(compute_in_base_dtype(adapted(RANK, base=torch.bfloat16)))
    assert set(mine) == set(exact) and all(gradient.dtype == torch.float32 for gradient in mine.values())

    def distance(some: dict[str, torch.Tensor]) -> float:
        return sum((some[name] - exact[name]).square().sum().item() for name in exact) ** 0.5

    norm = sum(gradient.square().sum().item() for gradient in exact.values()) ** 0.5
    assert distance(mine) < 0.05 * norm and distance(mine) < 2 * distance(by_peft)
    assert less < 0.75 * kept


class Casts(TorchDispatchMode):
    """Counts matrices of an adapter that are cast to bfloat16."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs and kwargs.get("dtype") == torch.bfloat16:
            self.count += args[0].dtype == torch.float32 and args[0].dim() == 2 and RANK in args[0].shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recomputed", [False, True])
def test_adapters_are_cast_once_a_step_and_not_a_bit_changes(recomputed: bool) -> None:
    found, counts = [], []
    for once in (False, True):
        vla = compute_in_base_dtype(adapted(RANK, base=torch.bfloat16))
        if recomputed:
            checkpoint_activations(vla, selective=True)
        with Casts() as casts, cast_once(vla) if once else contextlib.nullcontext():
            for _ in range(2):  # micro-batches
                vla(**BATCH).loss.backward()
        found.append({name: p.grad for name, p in vla.named_parameters() if p.grad is not None})
        counts.append(casts.count)
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
    layers = [layer for _, layer in casting_layers(vla)]
    assert counts[0] > counts[1] == 2 * len(layers)  # 13 of them are not run
    assert all(layer.casts is None for layer in layers)  # a step's casts don't outlive it


def one_layer(*, dropout: float = 0.0, ours: bool = True) -> tuple[Any, torch.Tensor]:
    """A linear layer with an adapter, in float64, and its input. ours: as compute_in_base_dtype makes it."""
    torch.manual_seed(1)
    holder = cast(Any, nn.Module())
    holder.proj = cast(Any, nn.Linear(6, 5))
    add_lora(holder, rank=2, dropout=dropout).double()
    if ours:
        compute_in_base_dtype(holder)
    nn.init.normal_(holder.proj.lora_B[ADAPTER].weight)
    assert isinstance(holder.proj, AdaptedLinear) is ours
    return holder.proj, torch.randn(2, 3, 6, dtype=torch.float64)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_product_and_its_gradients_are_pefts(dropout: float, compiled: bool) -> None:
    answers = []
    for ours in (False, True):
        layer, x = one_layer(dropout=dropout, ours=ours)
        x = x.transpose(0, 1).requires_grad_()  # not contiguous
        torch.manual_seed(2)
        out = torch.compile(layer, backend="eager", fullgraph=True)(x) if ours and compiled else layer(x)
        out.square().sum().backward()
        answers.append([out, x.grad, *(half.grad for half in halves_of(layer))])
    for theirs, mine in zip(*answers, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_merged_or_switched_off_peft_computes() -> None:
    layer, x = one_layer()
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_under_autocast_peft_computes(base: torch.dtype, adapter: torch.dtype) -> None:
    vla, peft = compute_in_base_dtype(adapted(2, base=base, adapter=adapter)), adapted(2, base=base, adapter=adapter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, theirs = (model(**BATCH).loss for model in (vla, peft))
    loss.backward()
    assert torch.equal(loss, theirs) and sum(parameter.grad is not None for parameter in vla.parameters()) == 100


def test_names_and_values_stay() -> None:
    theirs, mine = adapted(RANK, base=torch.bfloat16), compute_in_base_dtype(adapted(RANK, base=torch.bfloat16))
    for change in (lora_state_dict, lambda vla: merge_lora(vla).state_dict()):
        before, after = change(theirs), change(mine)
        assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
