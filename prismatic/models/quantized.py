"""Linear layers with integer weights, in plain torch. In: the parts of integers.py. Out: modules that stand in nn.Linear's place.

Each holds the parts under their stored names, or on a GPU int4 in the tinygemm kernel's order. Surprising: int8 multiplies its product by a
*float32* scale: with a bfloat16 one torch.compile turns the product into `_weight_int8pack_mm`, which on a GPU is a scalar kernel, tens of
times slower than a matrix product. tinygemm reads 4 bits a weight but is slow with many rows, so above FEW_ROWS int4 is
dequantised and multiplied. Nothing here has run on a GPU.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.errors import ConfigError
from prismatic.models import integers
from prismatic.models.integers import MIDDLE_NIBBLE, Parts

FEW_ROWS = 16  # up to which tinygemm is as fast as reading the weights allows, and torch._int_mm takes none
INNER_K_TILES = 8  # of tinygemm's packed layout: its blocks are 8 rows x 128 columns
BLOCK_ROWS, BLOCK_COLUMNS = 8, 16 * INNER_K_TILES
PADDED_WIDTH = 1024  # the kernel's weight is a multiple of it
NIBBLES = 8  # in an int32
TENSOR_CORES = (8, 0)  # compute capability that the kernel needs
LARGEST_INT8 = 127
SMALLEST = 1e-8  # scale of a row of zeros


class Int8Linear(nn.Module):
    """y = (x Wᵀ) · scale, W int8 with a float32 scale for each output channel.

    int8_activations: with more than FEW_ROWS rows x is rounded too, row by row (W8A8), and integers are multiplied.
    """

    weight_int8: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, parts: Parts, bias: torch.Tensor | None, *, int8_activations: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight_int8", parts["weight_int8"])
        self.register_buffer("weight_scale", parts["weight_scale"])
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = parts["weight_int8"].shape
        self.int8_activations = int8_activations

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, out) in the input's dtype."""
        rows = input.reshape(-1, self.in_features)
        if self.int8_activations and len(rows) > FEW_ROWS:
            wide = rows.float()
            scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST_INT8).clamp_min(SMALLEST)
            rounded = (wide / scale).round().to(torch.int8)
            product = torch._int_mm(rounded, self.weight_int8.t()).float() * scale  # pyright: ignore[reportPrivateImportUsage]
        else:
            product = (rows @ self.weight_int8.t().to(rows.dtype)).float()
        out = (product * self.weight_scale).to(input.dtype)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*input.shape[:-1], self.out_features)


class Int4Linear(nn.Module):
    """y = x Wᵀ, W in 4 bits as integers.py has it. On a CPU each pass works out the float weight again: right, but not fast."""

    def __init__(self, parts: Parts, bias: torch.Tensor | None) -> None:
        super().__init__()
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = len(parts["weight_int4"]), 2 * parts["weight_int4"].shape[1]

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The (out, in) weight."""
        return integers.to_float(dict(self.named_buffers())).to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, out) in the input's dtype."""
        return F.linear(input, self.dequantized(input.dtype), self.bias)


class TinyGemmLinear(nn.Module):
    """Int4Linear on a GPU, in bfloat16. The width is padded with zeros to what the kernel takes."""

    weight_tiles: torch.Tensor
    scale_and_zero: torch.Tensor
    order: torch.Tensor

    def __init__(self, parts: Parts, bias: torch.Tensor | None) -> None:
        super().__init__()
        packed, scale, zero = parts["weight_int4"], parts["weight_scale"], parts["weight_zero"]
        self.out_features, self.in_features = len(packed), 2 * packed.shape[1]
        self.group = self.in_features // scale.shape[1]
        self.padding = -self.in_features % PADDED_WIDTH
        packed = F.pad(packed, (0, self.padding // 2)).contiguous()
        scales = torch.stack([F.pad(part, (0, self.padding // self.group)) for part in (scale, zero)], dim=-1)
        self.register_buffer("weight_tiles", torch.ops.aten._convert_weight_to_int4pack(packed, INNER_K_TILES))
        self.register_buffer("scale_and_zero", scales.transpose(0, 1).contiguous().bfloat16())  # (groups, out, 2)
        self.register_buffer("order", tile_order(packed.device), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dequantized(self) -> torch.Tensor:
        """The (out, padded in) bfloat16 weight."""
        nibbles = unpack_tiles(self.weight_tiles, self.order)
        scale, zero = (part.float()[..., None] for part in self.scale_and_zero.transpose(0, 1).unbind(dim=-1))
        groups = nibbles.view(self.out_features, -1, self.group).float()
        return ((groups - MIDDLE_NIBBLE) * scale + zero).to(torch.bfloat16).flatten(1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, out) bfloat16."""
        rows = F.pad(input.reshape(-1, self.in_features), (0, self.padding))
        if len(rows) <= FEW_ROWS:
            out = torch.ops.aten._weight_int4pack_mm(rows, self.weight_tiles, self.group, self.scale_and_zero)
        else:
            out = rows @ self.dequantized().t()
        if self.bias is not None:
            out = out + self.bias
        return out.view(*input.shape[:-1], self.out_features)


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
    parts: Parts, bias: torch.Tensor | None, dtype: torch.dtype, *, int8_activations: bool = False
) -> nn.Module:
    """A layer that computes in dtype, on the device of its parts. ConfigError for an int4 that this GPU can't compute."""
    bias = None if bias is None else bias.detach().to(dtype)
    if "weight_int8" in parts:
        return Int8Linear(parts, bias, int8_activations=int8_activations)
    packed = parts["weight_int4"]
    if not packed.is_cuda or len(packed) % BLOCK_ROWS:
        return Int4Linear(parts, bias)
    if torch.cuda.get_device_capability(packed.device) < TENSOR_CORES:
        raise ConfigError("int4 needs a GPU of compute capability 8.0 (Ampere) or later: use int8")
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"int4 on a GPU computes in bfloat16, not in {dtype}: load the model as bfloat16, or use int8"
        )
    return TinyGemmLinear(parts, bias)


QUANTIZED = (Int8Linear, Int4Linear, TinyGemmLinear)
