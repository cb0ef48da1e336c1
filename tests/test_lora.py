"""Float32 adapters on a bfloat16 base, without a float32 copy of every activation."""

import torch

from prismatic.models.lora import add_lora, compute_in_base_dtype, lora_state_dict
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import VLA
from prismatic.training.live_bytes import LiveBytes
from tests.test_checkpointing import BATCH


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


def test_names_and_values_stay() -> None:
    vla = adapted(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in lora_state_dict(vla).items()}
    after = lora_state_dict(compute_in_base_dtype(vla))
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
