"""Layers of both backends compute what the integers say; what only a GPU can run is tried with what a GPU does in its place."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prismatic.models import backends, integers, quantized
from prismatic.models.quantized import Int8Linear, TinyGemmLinear, quantized_linear


def linear(out: int, width: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("width", [128, 352])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_the_rounded_weight(kind: str, width: int, dtype: torch.dtype) -> None:
    layer, x = linear(40, width), torch.randn(3, 5, width)
    parts = integers.to_parts(kind, layer.weight)
    expected = F.linear(x, integers.to_float(parts), layer.bias)
    with torch.inference_mode():
        got = quantized_linear(parts, layer.bias, dtype)(x.to(dtype)).float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def test_rounded_activations_are_for_many_rows_and_near() -> None:
    layer = linear(40, 128)
    parts = integers.to_parts("int8", layer.weight)
    plain, rounding = (Int8Linear(parts, layer.bias, int8_activations=on) for on in (False, True))
    few, many = torch.randn(16, 128), torch.randn(17, 128)
    many[0, 0] = 50.0  # an outlier costs its own row alone
    with torch.inference_mode():
        assert torch.equal(plain(few), rounding(few))
        error = (plain(many) - rounding(many)).std(dim=1) / plain(many).std(dim=1)
    assert 0 < error[1:].max() < 0.02 < error[0] < 0.3


def documented_packing(packed: torch.Tensor, inner: int) -> torch.Tensor:
    """torch's layout for tensor cores, as ATen's int4mm.cu has it: lanes of a warp hold pairs of two 16-column tiles."""
    nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(len(packed), -1).long()
    out, width = nibbles.shape
    tiles = torch.zeros(out // 8, width // (16 * inner), 32, inner // 2, dtype=torch.int64)
    for lane in range(32):
        for pair in range(inner // 2):
            for place, source in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                tile, value = 2 * pair + source // 4, source % 4
                column = tile * 16 + (lane % 4) * 2 + value % 2 + 8 * (value // 2)
                tiles[:, :, lane, pair] |= nibbles[lane // 4 :: 8, column :: 16 * inner] << 4 * place
    return torch.where(tiles >= 2**31, tiles - 2**32, tiles).int()


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized.tile_order.cache_clear()
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", documented_packing)


@pytest.mark.parametrize("width", [352, 2048])
def test_int4_with_many_rows_is_dequantised_out_of_the_kernels_order(packing: None, width: int) -> None:
    layer, x = linear(40, width), torch.randn(17, width).bfloat16()
    parts = integers.to_parts("int4", layer.weight)
    made = TinyGemmLinear(parts, layer.bias.detach().bfloat16())
    torch.testing.assert_close(made.dequantized()[:, :width], integers.to_float(parts).bfloat16())
    with torch.inference_mode():
        expected = F.linear(x, integers.to_float(parts).bfloat16(), made.bias)
        torch.testing.assert_close(made(x), expected, atol=0.02, rtol=0.02)


def test_int4_with_few_rows_is_the_kernels(packing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernel takes the same scales, zeros, group and padding; it has an order of its own."""

    def on_cpu(x: torch.Tensor, tiles: torch.Tensor, group: int, scale_and_zero: torch.Tensor) -> torch.Tensor:
        nibbles = quantized.unpack_tiles(tiles, quantized.tile_order(tiles.device))
        for_cpu = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles[:32].int(), 8)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, for_cpu, group, scale_and_zero[:, :32].contiguous())

    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", on_cpu)
    parts, x = integers.to_parts("int4", linear(32, 352).weight), torch.randn(16, 352).bfloat16()
    with torch.inference_mode():
        got = TinyGemmLinear(parts, None)(x)
    torch.testing.assert_close(got.float(), x.float() @ integers.to_float(parts).T, atol=0.05, rtol=0.02)


def test_the_gpu_layout_of_int4_by_its_shapes() -> None:
    shapes = integers.layout("int4", 4096, 11008)
    parts = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    tiles = torch.ops.aten._convert_weight_to_int4pack(F.pad(parts["weight_int4"], (0, 128)), quantized.INNER_K_TILES)
    assert tiles.shape == (4096 // 8, 11264 // 128, 32, 4) and tiles.dtype == torch.int32


@pytest.mark.parametrize(("kind", "width", "error"), [("int8", 96, 0.02), ("int4", 128, 0.15), ("int4", 96, 0.02)])
def test_bitsandbytes_is_near(kind: str, width: int, error: float) -> None:
    """The last: NF4 doesn't take the width, so it is LLM.int8."""
    layer, x = linear(40, width), torch.randn(6, width)
    made = backends.bitsandbytes_linear(layer, kind, torch.float32)
    with torch.inference_mode():
        difference = (made(x) - layer(x)).std() / layer(x).std()
    assert difference < error
