"""LoRA as a pass over a built model, through peft. In: a VLA. Out: the same object with adapters on all 439 linear layers of openvla-7b.

Surprising: OpenVLA's "all-linear" meant every module whose *last name* is one of the list below, which takes in `patch_embed.proj` (a
convolution), `lm_head` and parts the forward never reads; today's peft reads "all-linear" differently, so the names are written out.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from prismatic.models.heads import HEADS
from prismatic.models.vla import VLA

TARGET_MODULES = (
    "down_proj", "fc1", "fc2", "fc3", "gate_proj", "k_proj", "kv", "lm_head", "o_proj", "proj", "q", "q_proj", "qkv", "up_proj", "v_proj",
)  # fmt: skip
ADAPTER = "default"  # peft's name of the only adapter


def add_lora(vla: VLA, *, rank: int = 32, alpha: int | None = None, dropout: float = 0.0) -> VLA:
    """Freeze all of vla but its heads and put trainable adapters on it, in place; returns it. Names then hold `base_layer` and `lora_A.default`.

    OpenVLA's configuration: alpha None is min(rank, 16); A ~ N(0, 1/rank), B = 0. Heads are trained whole: they get no adapter.
    """
    import peft  # here: it takes seconds, and 200 MB in each of a loader's processes

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=min(rank, 16) if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(TARGET_MODULES),
        init_lora_weights="gaussian",
    )
    return inject(vla, config)


def inject(vla: VLA, config: Any) -> VLA:
    """add_lora with a peft.LoraConfig of any targets. The heads' layers are called fc1 and fc2 too: they are left out by name."""
    import peft

    vla.requires_grad_(False)
    if any(name.startswith(HEADS) for name, _ in vla.named_parameters()):
        config.exclude_modules = rf"({'|'.join(HEADS)})\..*"
    peft.inject_adapter_in_model(config, vla, adapter_name=ADAPTER)
    for name, parameter in vla.named_parameters():
        if name.startswith(HEADS):
            parameter.requires_grad_(True)
    return vla


def lora_layers(vla: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, peft's LoraLayer) of every adapted module."""
    for name, module in vla.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module
