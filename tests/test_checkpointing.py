"""Recomputed activations: not a bit changes, and less is kept. Compiled blocks give the same loss."""

import pytest
import torch

from prismatic.models.checkpointing import checkpoint_activations, compile_blocks
from prismatic.models.lora import add_lora
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import VLA
from prismatic.training.live_bytes import LiveBytes
from tests.drawn_batch import BATCH


def adapted(dropout: float) -> VLA:
    torch.manual_seed(0)
    vla = add_lora(random_vla(TINY, seed=0), rank=4, dropout=dropout).train()
    for name, parameter in vla.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return vla


def step(vla: VLA) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, bytes kept from forward to backward pass."""
    torch.manual_seed(1)
    with LiveBytes() as live:
        loss = vla(**BATCH).loss
        kept = live.now
    loss.backward()
    return loss, {name: p.grad for name, p in vla.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_are_bit_equal_and_less_is_kept(dropout: float) -> None:
    loss, gradients, kept = step(adapted(dropout))
    recomputed_loss, recomputed, less = step(checkpoint_activations(adapted(dropout)))
    assert torch.equal(loss, recomputed_loss) and set(gradients) == set(recomputed) and len(gradients) == 100
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name
    assert less < 0.6 * kept


def test_all_of_a_model_can_be_trained_so() -> None:
    _, gradients, _ = step(random_vla(TINY, seed=0))
    _, recomputed, _ = step(checkpoint_activations(random_vla(TINY, seed=0)))
    assert set(gradients) == set(recomputed)
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in gradients.items())


def test_names_and_acting_stay() -> None:
    plain, recomputing = random_vla(TINY, seed=0), checkpoint_activations(random_vla(TINY, seed=0))
    assert list(plain.state_dict()) == list(recomputing.state_dict())
    ids, pixels = BATCH["input_ids"], BATCH["pixel_values"]
    assert torch.equal(plain.generate_action_ids(ids, pixels), recomputing.generate_action_ids(ids, pixels))


def test_compiled_blocks_give_the_same_gradients() -> None:
    loss, gradients, _ = step(adapted(0.0))
    compiled = compile_blocks(checkpoint_activations(adapted(0.0)), backend="eager")
    again = compiled(**BATCH).loss
    again.backward()
    torch.testing.assert_close(again, loss)
    for name, parameter in compiled.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name])
