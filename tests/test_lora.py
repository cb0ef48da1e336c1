"""Float32 adapters on a bfloat16 base, without a float32 copy of every activation."""

from typing import Any

import pytest
import torch
from torch import nn

from prismatic.models.lora import ADAPTER, add_lora, lora_layers
from prismatic.models.lora_dtype import AdaptedLinear, compute_in_base_dtype
from prismatic.models.lora_weights import lora_state_dict, merge_lora
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.unused import unused_parameters
from prismatic.models.vla import VLA
from prismatic.training.live_bytes import LiveBytes
from tests.drawn_batch import BATCH


def adapted(base: torch.dtype) -> VLA:
    torch.manual_seed(0)
    vla = add_lora(random_vla(TINY, seed=0).to(base), rank=4).train()
    for name, parameter in vla.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return vla


def gradients(vla: VLA) -> tuple[dict[str, torch.Tensor], int]:
    with LiveBytes() as live:
        loss = vla(**BATCH).loss
        kept = live.now
    loss.backward()
    return {name: p.grad for name, p in vla.named_parameters() if p.grad is not None}, kept


def test_adapters_compute_in_the_bases_format_and_learn_in_their_own() -> None:
    exact, _ = gradients(adapted(torch.float32))
    by_peft, kept = gradients(adapted(torch.bfloat16))
    mine, less = gradients(compute_in_base_dtype(adapted(torch.bfloat16)))
    assert set(mine) == set(exact) and all(gradient.dtype == torch.float32 for gradient in mine.values())

    def distance(some: dict[str, torch.Tensor]) -> float:
        return sum((some[name] - exact[name]).square().sum().item() for name in exact) ** 0.5

    norm = sum(gradient.square().sum().item() for gradient in exact.values()) ** 0.5
    assert distance(mine) < 0.05 * norm and distance(mine) < 2 * distance(by_peft)
    assert less < 0.75 * kept


def trained_layers(vla: VLA) -> list[Any]:
    unread = unused_parameters(vla)
    return [layer for name, layer in lora_layers(vla) if not any(other.startswith(name) for other in unread)]


def one_layer(*, bias: bool, ours: bool = True) -> tuple[Any, torch.Tensor]:
    """A linear map with an adapter, in float64, and its input. ours: as compute_in_base_dtype makes it."""
    torch.manual_seed(1)
    holder: Any = nn.Module()
    holder.proj = nn.Linear(6, 5, bias=bias)
    add_lora(holder, rank=2).double()
    if ours:
        compute_in_base_dtype(holder)
    layer: Any = holder.proj
    nn.init.normal_(layer.lora_B[ADAPTER].weight)
    assert (type(layer) is AdaptedLinear) is ours
    return layer, torch.randn(2, 3, 6, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_and_its_gradients_are_pefts(bias: bool) -> None:
    answers = []
    for ours in (False, True):
        layer, x = one_layer(bias=bias, ours=ours)
        x.requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        trained = [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
        assert layer.base_layer.weight.grad is None
        answers.append([out, x.grad, *(parameter.grad for parameter in trained)])
    for theirs, mine in zip(*answers, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    layer, x = one_layer(bias=bias)
    assert torch.autograd.gradcheck(layer, x.requires_grad_())
    assert torch.autograd.gradcheck(layer, x.transpose(0, 1).detach().requires_grad_())  # not contiguous
    layer(x.detach()).sum().backward()  # pixels need no gradient


def test_no_second_copy_of_the_output_is_made() -> None:
    def peak(layer: Any, x: torch.Tensor) -> int:
        layer(x).backward(torch.ones(*x.shape[:-1], 64))  # gradients of the weights are there from now on
        with LiveBytes() as live:
            out = layer(x)
            out.backward(torch.ones_like(out))
        return live.peak

    torch.manual_seed(1)
    x = torch.randn(4096, 8)  # a narrow input: what is as large as the output counts
    peaks = []
    for change in (lambda holder: holder, compute_in_base_dtype):
        holder: Any = nn.Module()
        holder.proj = nn.Linear(8, 64)
        peaks.append(peak(change(add_lora(holder, rank=2)).proj, x))
    assert peaks[1] < peaks[0] - 0.9 * 4096 * 64 * 4  # an output less


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_under_autocast_peft_computes(base: torch.dtype, adapter: torch.dtype) -> None:
    vla = add_lora(random_vla(TINY, seed=0).to(base), rank=2)
    for parameter in vla.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter)
    compute_in_base_dtype(vla)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vla(**BATCH).loss
    loss.backward()
    assert torch.isfinite(loss) and all(layer.lora_A[ADAPTER].weight.grad is not None for layer in trained_layers(vla))


def test_a_merged_and_a_switched_off_adapter_count_once_and_not_at_all() -> None:
    layer, x = one_layer(bias=True)
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_a_trained_bias_gets_its_gradient() -> None:
    holder: Any = nn.Module()
    holder.proj = nn.Linear(6, 5)
    add_lora(holder, rank=2)
    layer: Any = holder.proj
    layer.base_layer.bias.requires_grad_()
    compute_in_base_dtype(holder)
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.base_layer.bias.grad is not None


def test_it_compiles_without_a_break() -> None:
    layer, x = one_layer(bias=True)
    expected = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert layer.lora_A[ADAPTER].weight.grad is not None


def test_with_dropout_peft_computes() -> None:
    vla = add_lora(random_vla(TINY, seed=0).bfloat16(), rank=2, dropout=0.1)
    assert not any(isinstance(layer, AdaptedLinear) for _, layer in lora_layers(compute_in_base_dtype(vla)))


def test_names_and_values_stay() -> None:
    vla = adapted(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in lora_state_dict(vla).items()}
    after = lora_state_dict(compute_in_base_dtype(vla))
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    merged = merge_lora(vla).state_dict()
    theirs = merge_lora(adapted(torch.bfloat16)).state_dict()
    assert list(merged) == list(theirs) and all(torch.equal(merged[name], theirs[name]) for name in merged)
