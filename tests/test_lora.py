"""Float32 adapters on a bfloat16 base, without a float32 copy of every activation."""

import contextlib
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prismatic.adapter import lora_state_dict, merge_lora
from prismatic.models.checkpointing import checkpoint_activations
from prismatic.models.lora import ADAPTER, add_lora, lora_layers
from prismatic.models.lora_dtype import AdaptedLinear, cast_once, compute_in_base_dtype
from prismatic.models.tiny import TINY, random_vla
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
    assert counts[0] > 300 and counts[1] == 0  # together it is a copy of another kind
    layer = next(layer for _, layer in lora_layers(vla) if isinstance(layer, AdaptedLinear))
    assert layer.casts == (None, None)  # a step's casts don't outlive it


def one_layer(*, bias: bool = True, ours: bool = True) -> tuple[Any, torch.Tensor]:
    """A linear layer with an adapter, in float64, and its input. ours: as compute_in_base_dtype makes it."""
    torch.manual_seed(1)
    holder = cast(Any, nn.Module())
    holder.proj = cast(Any, nn.Linear(6, 5, bias=bias))
    add_lora(holder, rank=2).double()
    if ours:
        compute_in_base_dtype(holder)
    nn.init.normal_(holder.proj.lora_B[ADAPTER].weight)
    assert (type(holder.proj) is AdaptedLinear) is ours
    return holder.proj, torch.randn(2, 3, 6, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_and_its_gradients_are_pefts(bias: bool) -> None:
    answers = []
    for ours in (False, True):
        layer, x = one_layer(bias=bias, ours=ours)
        x.requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        assert layer.base_layer.weight.grad is None
        halves = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        answers.append([out, x.grad, *(half.grad for half in halves)])
    for theirs, mine in zip(*answers, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    layer, x = one_layer(bias=bias)
    assert torch.autograd.gradcheck(layer, x.requires_grad_())
    assert torch.autograd.gradcheck(layer, x.transpose(0, 1).detach().requires_grad_())  # not contiguous
    layer(x.detach()).sum().backward()  # pixels need no gradient


def test_no_second_copy_of_the_output_is_made() -> None:
    torch.manual_seed(1)
    x, peaks = torch.randn(4096, 8), []  # a narrow input: what is as large as the output counts
    for change in (lambda holder: holder, compute_in_base_dtype):
        holder = cast(Any, nn.Module())
        holder.proj = cast(Any, nn.Linear(8, 64))
        layer = cast(Any, change(add_lora(holder, rank=2))).proj
        layer(x).backward(torch.ones(4096, 64))  # gradients of the weights are there from now on
        with LiveBytes() as live:
            out = layer(x)
            out.backward(torch.ones_like(out))
        peaks.append(live.peak)
    assert peaks[1] < peaks[0] - 0.9 * 4096 * 64 * 4  # an output less


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_under_autocast_peft_computes(base: torch.dtype, adapter: torch.dtype) -> None:
    vla = adapted(2, base=base, adapter=adapter)
    compute_in_base_dtype(vla)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vla(**BATCH).loss
    loss.backward()
    assert torch.isfinite(loss) and sum(parameter.grad is not None for parameter in vla.parameters()) == 100


def test_where_the_product_is_not_made_for_it_peft_computes() -> None:
    layer, x = one_layer()
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    dropping = compute_in_base_dtype(add_lora(random_vla(TINY, seed=0).bfloat16(), rank=2, dropout=0.1))
    assert not any(isinstance(layer, AdaptedLinear) for _, layer in lora_layers(dropping))
    holder = cast(Any, nn.Module())
    holder.proj = cast(Any, nn.Linear(6, 5))
    add_lora(holder, rank=2)
    holder.proj.base_layer.bias.requires_grad_()  # a trained one gets its gradient
    compute_in_base_dtype(holder)
    holder.proj(torch.randn(3, 6)).sum().backward()
    assert holder.proj.base_layer.bias.grad is not None


def test_it_compiles_without_a_break() -> None:
    layer, x = one_layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.lora_A[ADAPTER].weight.grad is not None


def test_names_and_values_stay() -> None:
    vla = adapted(RANK, base=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in lora_state_dict(vla).items()}
    after = lora_state_dict(compute_in_base_dtype(vla))
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    merged, theirs = merge_lora(vla).state_dict(), merge_lora(adapted(RANK, base=torch.bfloat16)).state_dict()
    assert list(merged) == list(theirs) and all(torch.equal(merged[name], theirs[name]) for name in merged)
