"""Who computes a quantised linear layer: torch itself (quantized.py), or bitsandbytes, which is imported only when used: it takes seconds.

bitsandbytes: LLM.int8 (which also rounds the activations, whole batch at a time) and NF4, for OpenVLA's load_in_8bit and load_in_4bit.
"""

import importlib.metadata
import logging
from typing import Any

import torch
from torch import nn

BACKENDS = ("torch", "bitsandbytes")
OLD_NAME = {"torchao": "torch"}  # who it was until torch did it alone
OUTLIER = 6.0  # activations above it stay in 16 bits: LLM.int8's own value
NF4_BLOCK = 64  # weights that share a scale; bitsandbytes 0.50.2 on a CPU mistakes widths that it does not divide


def described(backend: str) -> str:
    """Name and version, as a result records it: `torch 2.14.1`."""
    return f"{backend} {importlib.metadata.version(backend)}"


def bitsandbytes_linear(linear: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Module:
    """The layer in LLM.int8 or, where its width allows, NF4 with compressed scales; on the same device."""
    import bitsandbytes

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(
        logging.ERROR
    )  # else a line for every layer and pass in float32
    layers: Any = bitsandbytes.nn  # its names are not declared as exported
    device, (out, width) = linear.weight.device, linear.weight.shape
    weight = linear.weight.detach().to(dtype)
    with torch.device("meta"):  # the layer is filled below
        if kind == "int4" and width % NF4_BLOCK == 0:
            made = layers.Linear4bit(width, out, bias=False, compute_dtype=dtype, quant_type="nf4")
            made.weight = layers.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", module=made)
        else:
            made = layers.Linear8bitLt(width, out, bias=False, has_fp16_weights=False, threshold=OUTLIER)
            made.weight = layers.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    made = made.to(device)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
    return made
