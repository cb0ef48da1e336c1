"""A base in 4-bit NormalFloat (QLoRA's NF4) through bitsandbytes, for training adapters on it, on a GPU or a CPU. A pass over an empty VLA.

Packed is what the original's --use_quantization packs: every nn.Linear of both towers, projector and decoder; not lm_head, the embedding
table, convolutions, norms and biases. 64 values share a float32 scale, which is not packed again. The model is filled afterwards, matrix by
matrix: no more than one is on the device unpacked.

Surprising: bitsandbytes' CPU kernel (0.50.2) unpacks a matrix wrongly whose rows don't divide by 64 (25 % off in place of 9 %), so on a CPU such
matrices stay as they are: at full size SigLIP's fc2.
"""

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prismatic.models.heads import HEADS

if TYPE_CHECKING:
    from prismatic.models.vla import VLA


BLOCK = 64  # values that share a scale
BYTES_PER_VALUE = 0.5 + 4 / BLOCK
HEAD = "lm_head"


def quantised_linears(vla: nn.Module, *, on_cpu: bool) -> Iterator[tuple[str, nn.Linear]]:
    """(name, module) of what is packed."""
    for name, module in vla.named_modules():
        if type(module) is not nn.Linear or name.startswith(HEADS) or name.endswith(HEAD):
            continue
        if not (on_cpu and module.in_features % BLOCK):
            yield name, module


def prepare_nf4(vla: "VLA", *, on_cpu: bool) -> "VLA":
    """Replace those modules of an empty model (on the meta device) by bitsandbytes', in place; `pack` then makes their weights."""
    bitsandbytes: Any = importlib.import_module("bitsandbytes")  # here, because it loads a native library

    for name, linear in list(quantised_linears(vla, on_cpu=on_cpu)):
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            quant_type="nf4",
            compress_statistics=False,
            device=torch.device("meta"),
        )
        # it would repack when acting, and training after that has no gradient
        packed.support_avx512bf16_for_cpu = False
        vla.set_submodule(name, packed)
    vla.is_loaded_in_4bit = True  # pyright: ignore  (how peft knows)
    return vla


def is_packed(module: nn.Module, name: str) -> bool:
    """Whether a module's parameter of this name is one that `pack` makes."""
    return name == "weight" and type(module).__name__ == "Linear4bit"


def pack(module: Any, weight: torch.Tensor, device: torch.device | str) -> None:
    """Give a prepared module its weight (out, in), packed on device."""
    bitsandbytes: Any = importlib.import_module("bitsandbytes")

    module.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", blocksize=BLOCK, compress_statistics=False, module=module
    ).to(device)
