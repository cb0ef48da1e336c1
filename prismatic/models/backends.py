"""Quantised linear layers of two libraries, built from a weight or its integer parts. Both are imported only when used: they take seconds.

torchao: weight only, the layer stays nn.Linear and its weight becomes a tensor subclass. On a GPU int4 is packed for the tinygemm kernel
(bfloat16, compute capability 8.0 or later); elsewhere every pass works out the float weight again: right, but neither small nor fast.
bitsandbytes: LLM.int8 (which also rounds the activations, whole batch at a time) and NF4, for OpenVLA's load_in_8bit and load_in_4bit.
"""

import importlib.metadata
import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.errors import ConfigError
from prismatic.models import integers
from prismatic.models.integers import MIDDLE_NIBBLE, Parts

BACKENDS = ("torchao", "bitsandbytes")
INNER_K_TILES = 8  # of the packed layout, as torchao has it
PADDED_WIDTH, PADDED_ROWS = 1024, 8  # the tinygemm kernel's weight is a multiple of these
TENSOR_CORES = (8, 0)  # compute capability that the kernel needs
OUTLIER = 6.0  # activations above it stay in 16 bits: LLM.int8's own value
NF4_BLOCK = 64  # weights that share a scale; bitsandbytes 0.50.2 on a CPU mistakes widths that it does not divide


def described(backend: str) -> str:
    """Name and version, as a result records it: `torchao 0.18.0`."""
    return f"{backend} {importlib.metadata.version(backend)}"


def torchao_weight(parts: Parts, dtype: torch.dtype) -> nn.Parameter:
    """A weight for nn.Linear that computes in dtype, on the device of its parts. ConfigError for an int4 that this GPU can't compute."""
    logging.getLogger("torch.utils._pytree").setLevel(
        logging.ERROR
    )  # torchao 0.18 warns there, of itself, when imported
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    if "weight_int8" in parts:
        values = parts["weight_int8"]
        return _frozen(Int8Tensor(values, parts["weight_scale"][:, None], [1, values.shape[1]], dtype))
    if parts["weight_int4"].is_cuda:
        return _frozen(_tile_packed(parts, dtype))
    scale, zero = parts["weight_scale"].float(), parts["weight_zero"].float()
    values = integers.unpacked(parts).to(torch.int8) - MIDDLE_NIBBLE
    return _frozen(
        IntxUnpackedToInt8Tensor(
            qdata=values,
            scale=scale,
            zero_point=-zero / scale,
            target_dtype=torch.int4,  # pyright: ignore[reportAttributeAccessIssue]  (it is there)
            block_size=(1, values.shape[1] // scale.shape[1]),
            dtype=dtype,
            activation_quantization=None,
        )
    )


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _tile_packed(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Padded with zeros to what the kernel takes, and packed in its order; the formula W = (nibble - 8) · scale + zero is the kernel's."""
    from torchao.quantization import Int4TilePackedTo4dTensor
    from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

    packed, scale, zero = parts["weight_int4"], parts["weight_scale"], parts["weight_zero"]
    if packed.is_cuda and torch.cuda.get_device_capability(packed.device) < TENSOR_CORES:
        raise ConfigError("int4 needs a GPU of compute capability 8.0 (Ampere) or later: use int8")
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"int4 on a GPU computes in bfloat16, not in {dtype}: load the model as bfloat16, or use int8"
        )
    out, width = packed.shape[0], 2 * packed.shape[1]
    group = width // scale.shape[1]
    more_rows, more_columns = -out % PADDED_ROWS, -width % PADDED_WIDTH
    packed = F.pad(packed, (0, more_columns // 2, 0, more_rows))
    scale, zero = (F.pad(part, (0, more_columns // group, 0, more_rows)) for part in (scale, zero))
    return Int4TilePackedTo4dTensor(
        qdata=torch.ops.aten._convert_weight_to_int4pack(packed.contiguous(), INNER_K_TILES),
        scale_and_zero=pack_tinygemm_scales_and_zeros(scale, zero, torch.bfloat16),
        block_size=[1, group],
        shape=torch.Size((out, width)),
    )


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
