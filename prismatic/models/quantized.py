"""Linear layers with integer weights, in plain torch or through bitsandbytes. In: an nn.Linear. Out: a module that stands in its place.

Surprising: int8 multiplies its product by a *float32* scale: with a bfloat16 one torch.compile turns the product into `_weight_int8pack_mm`,
which on a GPU is a scalar kernel, tens of times slower than a matrix product. Before a matrix product the weight is written out in bfloat16,
2.5 times a bfloat16 layer's traffic; so up to REDUCED_ROWS a compiled layer sums row by row: Inductor makes one kernel of that, which reads the
integers once. Nothing here has run on a GPU.
"""

import logging
from typing import Any

import torch
from torch import nn

from prismatic.models.integers import LARGEST_INT8, SMALLEST, Parts, to_float, to_parts

REDUCED_ROWS = 8  # a verified draft of one row has 6
FEW_ROWS = 16  # torch._int_mm takes more
OUTLIER = 6.0  # activations above it stay in 16 bits: LLM.int8's own value
NF4_BLOCK = 64  # weights that share a scale; bitsandbytes 0.50.2 on a CPU mistakes widths that it does not divide


class QuantizedLinear(nn.Module):
    """Parts of integers.py as buffers under their stored names, and a bias.

    int8_activations: an int8 layer rounds x too, row by row, where there are more than FEW_ROWS rows (W8A8), and integers are multiplied.
    """

    weight_int8: torch.Tensor  # of an int8 layer
    weight_scale: torch.Tensor

    def __init__(self, parts: Parts, bias: torch.Tensor | None, *, int8_activations: bool = False) -> None:
        super().__init__()
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.is_int8, self.int8_activations = "weight_int8" in parts, int8_activations

    def dequantized(self) -> torch.Tensor:
        """(out, in) float32."""
        return to_float(dict(self.named_buffers()))

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, in) → (R, out)."""
        if not self.is_int8:
            return rows @ self.dequantized().to(rows.dtype).t()
        weight = self.weight_int8.t()
        if self.int8_activations and len(rows) > FEW_ROWS:
            wide = rows.float()
            scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST_INT8).clamp_min(SMALLEST)
            rounded = (wide / scale).round().to(torch.int8)
            product = torch._int_mm(rounded, weight).float() * scale  # pyright: ignore[reportPrivateImportUsage]
        else:
            product = (rows @ weight.to(rows.dtype)).float()
        return product * self.weight_scale

    def reduced(self, rows: torch.Tensor) -> torch.Tensor:
        """The same in float32, as sums over the weight's rows: for a compiler, which reads the weight once for all of them."""
        weight = self.dequantized()
        return torch.stack([(weight * row.float()).sum(dim=1) for row in rows.unbind()])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, out) in the input's dtype."""
        rows = input.flatten(0, -2)
        few = len(rows) <= REDUCED_ROWS and rows.is_cuda and torch.compiler.is_compiling()
        out = (self.reduced(rows) if few else self.product(rows)).to(input.dtype)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*input.shape[:-1], -1)


def quantized_linear(
    linear: nn.Linear, kind: str, dtype: torch.dtype, *, int8_activations: bool = False
) -> QuantizedLinear:
    """The layer in int8 or int4, computing in dtype on the same device; of an empty (meta) layer an empty one."""
    parts = to_parts(kind, linear.weight)
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    return QuantizedLinear(parts, bias, int8_activations=int8_activations)


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
