"""Recomputed activations: not a bit changes, and less is kept. Compiled blocks give the same loss."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prismatic.models import checkpointing
from prismatic.models.checkpointing import checkpoint_activations, compile_blocks, lean_activations
from prismatic.models.lora_dtype import cast_once, compute_in_base_dtype
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import VLA
from prismatic.training.live_bytes import LiveBytes
from tests.drawn_batch import BATCH, adapted

Gradients = dict[str, torch.Tensor]


def step(vla: VLA) -> tuple[torch.Tensor, Gradients, int]:
    """Loss, gradients, bytes kept from forward to backward pass."""
    torch.manual_seed(1)
    with LiveBytes() as live:
        loss = vla(**BATCH).loss
        kept = live.now
    loss.backward()
    return loss, {name: p.grad for name, p in vla.named_parameters() if p.grad is not None}, kept


def assert_equal(mine: Gradients, theirs: Gradients) -> None:
    assert set(mine) == set(theirs)
    for name, gradient in mine.items():
        assert torch.equal(gradient, theirs[name]), name


@pytest.mark.parametrize(
    "make", [lambda: adapted(4), lambda: adapted(4, dropout=0.1), lambda: random_vla(TINY, seed=0)], ids=["LoRA", "dropout", "whole"]
)  # fmt: skip
def test_gradients_are_bit_equal_and_less_is_kept(make: Callable[[], VLA]) -> None:
    loss, gradients, kept = step(make())
    recomputed_loss, recomputed, less = step(checkpoint_activations(make()))
    assert torch.equal(loss, recomputed_loss) and less < 0.6 * kept
    assert_equal(recomputed, gradients)


def in_bfloat16() -> VLA:
    """As on a GPU: a bfloat16 base, adapters in float32."""
    return compute_in_base_dtype(adapted(4, base=torch.bfloat16))


def test_norms_and_swiglu_keep_their_inputs_alone_and_not_a_bit_changes() -> None:
    (loss, gradients, kept), (lean_loss, lean, less) = step(in_bfloat16()), step(lean_activations(in_bfloat16()))
    assert torch.equal(loss, lean_loss) and less < 0.9 * kept
    assert_equal(lean, gradients)


def test_selective_recomputing_keeps_products_and_not_a_bit_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "LARGE", 32)  # the small model's widths, beyond an adapter's rank
    multiplied: list[int] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            multiplied[-1] += func.overloadpacket in checkpointing.PRODUCTS and args[-1].shape[0] >= 32
            return func(*args, **(kwargs or {}))

    results = []
    for recompute in (
        lambda vla: vla,
        lambda vla: checkpoint_activations(vla, selective=True),
        checkpoint_activations,
    ):
        multiplied.append(0)
        vla = recompute(lean_activations(in_bfloat16()))
        with Products():
            results.append(step(vla))
    (loss, gradients, kept), (selective_loss, selective, less), (_, _, least) = results
    assert torch.equal(loss, selective_loss) and least < less < 0.85 * kept
    assert_equal(selective, gradients)
    assert multiplied[0] == multiplied[1] < multiplied[2]  # no large product is computed twice


def test_names_and_acting_stay() -> None:
    plain, recomputing = random_vla(TINY, seed=0), checkpoint_activations(lean_activations(random_vla(TINY, seed=0)))
    assert list(plain.state_dict()) == list(recomputing.state_dict())
    ids, pixels = BATCH["input_ids"], BATCH["pixel_values"]
    assert torch.equal(plain.generate_action_ids(ids, pixels), recomputing.generate_action_ids(ids, pixels))


def test_compiled_blocks_with_adapters_that_are_cast_once_go_on_from_step_to_step() -> None:
    """As finetune.py --compile True trains on a GPU: the casts are other tensors in each step."""
    found = []
    for compiled in (False, True):
        vla = checkpoint_activations(
            lean_activations(compute_in_base_dtype(adapted(4, base=torch.bfloat16))), selective=True
        )
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            compile_blocks(vla, backend="aot_eager")
        optimizer = torch.optim.SGD([p for p in vla.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(3):
            with cast_once(vla):
                loss = vla(**BATCH).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_blocks_give_the_same_gradients() -> None:
    loss, gradients, _ = step(adapted(4))
    compiled = compile_blocks(checkpoint_activations(lean_activations(adapted(4)), selective=True), backend="eager")
    compiled_loss, again, _ = step(compiled)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(again, gradients)
