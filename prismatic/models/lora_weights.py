"""The weights of an adapter on a built model: under the names of peft's files, or folded into the base's."""

import torch

from prismatic.models.lora import ADAPTER, lora_layers
from prismatic.models.vla import VLA

FILE_PREFIX = "base_model.model."  # what peft puts before every name in adapter_model.safetensors


def lora_state_dict(vla: VLA) -> dict[str, torch.Tensor]:
    """Adapter tensors under the names that peft's file has: `base_model.model.….lora_A.weight`."""
    return {
        FILE_PREFIX + name.replace(f".{ADAPTER}.", "."): tensor
        for name, tensor in vla.state_dict().items()
        if ".lora_A." in name or ".lora_B." in name
    }


def merge_lora(vla: VLA) -> VLA:
    """Fold every adapter into its base weight, computed in float32, and take the adapters away; in place, returns vla. Names are plain again."""
    for name, layer in list(lora_layers(vla)):
        base = layer.get_base_layer()
        with torch.no_grad():
            delta = layer.get_delta_weight(ADAPTER).float()
            base.weight.copy_((base.weight.float() + delta).to(base.weight.dtype))
        parent, _, last = name.rpartition(".")
        setattr(vla.get_submodule(parent), last, base)
    return vla
