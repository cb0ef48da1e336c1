"""Linear layers with integer weights, in plain torch or through bitsandbytes. In: an nn.Linear. Out: a module that stands in its place.

Surprising: int8 multiplies its product by a *float32* scale: with a bfloat16 one torch.compile turns the product into `_weight_int8pack_mm`,
which on a GPU is a scalar kernel, tens of times slower than a matrix product. tinygemm reads 4 bits a weight but is slow with many rows, so
above FEW_ROWS int4 is dequantised and multiplied. Nothing here has run on a GPU.
"""

import functools
import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.errors import ConfigError
from prismatic.models.integers import LARGEST_INT8, MIDDLE_NIBBLE, SMALLEST, Parts, to_float, to_parts

FEW_ROWS = 16  # up to which tinygemm is as fast as reading the weights allows, and torch._int_mm takes none
INNER_K_TILES = 8  # of tinygemm's packed layout: its blocks are 8 rows x 128 columns
BLOCK_ROWS, BLOCK_COLUMNS = 8, 16 * INNER_K_TILES
PADDED_WIDTH = 1024  # the kernel's weight is a multiple of it
NIBBLES = 8  # in an int32
TENSOR_CORES = (8, 0)  # compute capability that the kernel needs
OUTLIER = 6.0  # activations above it stay in 16 bits: LLM.int8's own value
NF4_BLOCK = 64  # weights that share a scale; bitsandbytes 0.50.2 on a CPU mistakes widths that it does not divide


class QuantizedLinear(nn.Module):
    """Parts of integers.py as buffers under their stored names, and a bias; subclasses multiply."""

    def __init__(self, parts: Parts, bias: torch.Tensor | None) -> None:
        super().__init__()
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, in) → (R, out)."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, out) in the input's dtype."""
        out = self.product(input.flatten(0, -2)).to(input.dtype)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*input.shape[:-1], -1)


class Int8Linear(QuantizedLinear):
    """y = (x Wᵀ) · scale, W int8 with a float32 scale for each output channel.

    int8_activations: with more than FEW_ROWS rows x is rounded too, row by row (W8A8), and integers are multiplied.
    """

    weight_int8: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, parts: Parts, bias: torch.Tensor | None, *, int8_activations: bool = False) -> None:
        super().__init__(parts, bias)
        self.int8_activations = int8_activations

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        if self.int8_activations and len(rows) > FEW_ROWS:
            wide = rows.float()
            scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST_INT8).clamp_min(SMALLEST)
            rounded = (wide / scale).round().to(torch.int8)
            product = torch._int_mm(rounded, self.weight_int8.t()).float() * scale  # pyright: ignore[reportPrivateImportUsage]
        else:
            product = (rows @ self.weight_int8.t().to(rows.dtype)).float()
        return product * self.weight_scale


class Int4Linear(QuantizedLinear):
    """y = x Wᵀ, W in 4 bits as integers.py has it. Each pass works out the float weight again: right, but not fast."""

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ to_float(dict(self.named_buffers())).to(rows.dtype).t()


class TinyGemmLinear(QuantizedLinear):
    """Int4Linear on a GPU, in bfloat16, in the kernel's order. The width is padded with zeros to what the kernel takes."""

    weight_tiles: torch.Tensor
    scale_and_zero: torch.Tensor
    order: torch.Tensor

    def __init__(self, parts: Parts, bias: torch.Tensor | None) -> None:
        packed, scale, zero = parts["weight_int4"], parts["weight_scale"], parts["weight_zero"]
        width = 2 * packed.shape[1]
        self.group, self.padding = width // scale.shape[1], -width % PADDED_WIDTH
        packed = F.pad(packed, (0, self.padding // 2)).contiguous()
        scales = torch.stack([F.pad(part, (0, self.padding // self.group)) for part in (scale, zero)], dim=-1)
        tiles = torch.ops.aten._convert_weight_to_int4pack(packed, INNER_K_TILES)
        groups = scales.transpose(0, 1).contiguous().bfloat16()  # (groups, out, 2)
        super().__init__({"weight_tiles": tiles, "scale_and_zero": groups}, bias)
        self.register_buffer("order", tile_order(packed.device), persistent=False)

    def dequantized(self) -> torch.Tensor:
        """The (out, padded in) bfloat16 weight."""
        nibbles = unpack_tiles(self.weight_tiles, self.order)
        scale, zero = (part.float()[..., None] for part in self.scale_and_zero.transpose(0, 1).unbind(dim=-1))
        groups = nibbles.view(len(nibbles), -1, self.group).float()
        return ((groups - MIDDLE_NIBBLE) * scale + zero).to(torch.bfloat16).flatten(1)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        rows = F.pad(rows, (0, self.padding))
        if len(rows) <= FEW_ROWS:
            return torch.ops.aten._weight_int4pack_mm(rows, self.weight_tiles, self.group, self.scale_and_zero)
        return rows @ self.dequantized().t()


@functools.cache
def tile_order(device: torch.device) -> torch.Tensor:
    """(1024,) int64: where in a packed block the kernel keeps each value of 8 rows x 128 columns.

    Asked of torch itself, whose packing alone defines it: three blocks that hold the hexadecimal digits of each value's number are packed.
    """
    count = BLOCK_ROWS * BLOCK_COLUMNS
    number = torch.arange(count, device=device).view(BLOCK_ROWS, BLOCK_COLUMNS)
    found = torch.zeros(count, dtype=torch.int64, device=device)
    for digit in range(3):
        nibbles = (number >> 4 * digit & 15).repeat(1, PADDED_WIDTH // BLOCK_COLUMNS).to(torch.uint8)
        tiles = torch.ops.aten._convert_weight_to_int4pack(nibbles[:, ::2] << 4 | nibbles[:, 1::2], INNER_K_TILES)
        found += _nibbles(tiles)[0, 0] << 4 * digit
    return found.argsort()


def unpack_tiles(tiles: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """(out / 8, in / 128, 32, 4) int32 → (out, in) int32, 0 … 15."""
    blocks = _nibbles(tiles)[..., order].unflatten(-1, (BLOCK_ROWS, BLOCK_COLUMNS))
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def _nibbles(tiles: torch.Tensor) -> torch.Tensor:
    """Packed int32 words → (out / 8, in / 128, 1024) int32, in the kernel's order."""
    shifts = 4 * torch.arange(NIBBLES, device=tiles.device, dtype=torch.int32)
    return (tiles.flatten(2)[..., None] >> shifts & 15).flatten(2)


def quantized_linear(
    linear: nn.Linear, kind: str, dtype: torch.dtype, *, int8_activations: bool = False
) -> QuantizedLinear:
    """The layer in int8 or int4, computing in dtype on the same device; of an empty (meta) layer an empty one. ConfigError as for for_gpu."""
    parts = to_parts(kind, linear.weight)
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    if kind == "int8":
        return Int8Linear(parts, bias, int8_activations=int8_activations)
    return for_gpu(Int4Linear(parts, bias), dtype)


def for_gpu(layer: Int4Linear, dtype: torch.dtype) -> QuantizedLinear:
    """The kernel's form of a layer on a GPU, any other as it is. ConfigError for an int4 that this GPU can't compute."""
    parts = dict(layer.named_buffers())
    packed = parts["weight_int4"]
    if not packed.is_cuda or len(packed) % BLOCK_ROWS:
        return layer
    if torch.cuda.get_device_capability(packed.device) < TENSOR_CORES:
        raise ConfigError("int4 needs a GPU of compute capability 8.0 (Ampere) or later: use int8")
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"int4 on a GPU computes in bfloat16, not in {dtype}: load the model as bfloat16, or use int8"
        )
    return TinyGemmLinear(parts, layer.bias)


def bitsandbytes_linear(linear: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Module:
    """The layer in LLM.int8, which also rounds the activations, whole batch at a time, or, for int4 where its width allows, in NF4."""
    import bitsandbytes  # here, because it takes seconds

    # else a line for every layer and pass in float32
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
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
