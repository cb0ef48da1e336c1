"""Layers of both libraries compute what the integers say; what only a GPU can run is checked by its shapes."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prismatic.errors import ConfigError
from prismatic.models import backends, integers


def linear(out: int, width: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("width", [128, 352])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_computes_with_the_rounded_weight(kind: str, width: int, dtype: torch.dtype) -> None:
    layer, x = linear(40, width), torch.randn(3, 5, width)
    parts = integers.to_parts(kind, layer.weight)
    expected = F.linear(x, integers.to_float(parts), layer.bias)
    layer.weight = backends.torchao_weight(parts, dtype)
    layer.bias = nn.Parameter(layer.bias.to(dtype))
    with torch.inference_mode():
        got = layer(x.to(dtype)).float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("out", "width"), [(40, 352), (4096, 11008)])
def test_the_gpu_layout_of_int4_by_its_shapes(out: int, width: int) -> None:
    shapes = integers.layout("int4", out, width)
    parts = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    packed: Any = backends._tile_packed(parts, torch.bfloat16)
    padded = -(-width // 1024) * 1024
    assert packed.shape == (out, width) and packed.dtype == torch.bfloat16
    assert packed.qdata.shape == (out // 8, padded // 128, 32, 4)
    assert packed.scale_and_zero.shape == (padded // (integers.group_size(width) or 1), out, 2)
    with pytest.raises(ConfigError, match="computes in bfloat16"):
        backends._tile_packed(parts, torch.float32)


def test_the_gpu_layout_of_int4_by_the_cpus_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the order in which a GPU wants its nibbles can't be tried here: scales, zeros and padding are the same for the CPU's kernel."""
    parts = integers.to_parts("int4", linear(40, 352).weight)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(
        torch.ops.aten, "_convert_weight_to_int4pack", lambda packed, tiles: given.append(packed) or packed
    )
    layer: Any = backends._tile_packed(parts, torch.bfloat16)
    nibbles = integers.unpacked({"weight_int4": given[0]})
    assert nibbles.shape == (40, 1024) and torch.equal(nibbles[:, :352], integers.unpacked(parts))
    x = F.pad(torch.randn(3, 352), (0, 1024 - 352)).bfloat16()
    for_cpu = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles[:32].int(), 8)
    got = torch.ops.aten._weight_int4pack_mm_for_cpu(x, for_cpu, 32, layer.scale_and_zero[:, :32].contiguous())
    expected = x[:, :352].float() @ integers.to_float(parts)[:32].T
    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize(("kind", "width", "error"), [("int8", 96, 0.02), ("int4", 128, 0.15), ("int4", 96, 0.02)])
def test_bitsandbytes_is_near(kind: str, width: int, error: float) -> None:
    """The last: NF4 doesn't take the width, so it is LLM.int8."""
    layer, x = linear(40, width), torch.randn(6, width)
    made = backends.bitsandbytes_linear(layer, kind, torch.float32)
    with torch.inference_mode():
        difference = (made(x) - layer(x)).std() / layer(x).std()
    assert difference < error
