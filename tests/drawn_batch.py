"""A batch of two samples for the small random model, and that model with adapters that are not zero."""

import torch

from prismatic.models.lora import add_lora
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import VLA

GENERATOR = torch.Generator().manual_seed(0)
BATCH = {
    "input_ids": torch.randint(3, 1000, (2, 20), generator=GENERATOR),
    "attention_mask": None,
    "pixel_values": torch.randn(2, 12, 128, 128, generator=GENERATOR),
    "labels": torch.randint(3, 1000, (2, 20), generator=GENERATOR),
}


def adapted(
    rank: int, *, base: torch.dtype = torch.float32, adapter: torch.dtype = torch.float32, dropout: float = 0.0
) -> VLA:
    """A base in one dtype, its adapters in another; the same numbers each time."""
    torch.manual_seed(0)
    vla = add_lora(random_vla(TINY, seed=0).to(base), rank=rank, dropout=dropout).train()
    for name, parameter in vla.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter)
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return vla
