"""Weights as integers, the layers that compute with them, and the pass over a model: which layers, how many bytes, what it answers and refuses."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prismatic.errors import ConfigError
from prismatic.models import integers
from prismatic.models.decode import action_logits
from prismatic.models.lora import add_lora
from prismatic.models.quantize import plan, quantize, stored_bytes
from prismatic.models.quantized import bitsandbytes_linear, quantized_linear
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import VLA, VLAConfig

FIRST, LAST = TINY.vocab_size - TINY.n_action_bins, TINY.vocab_size
KINDS = pytest.mark.parametrize("kind", ["int8", "int4"])


def drawn(out: int, width: int) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(0))


def test_int8_is_off_by_half_a_step_at_most_and_uses_the_whole_range() -> None:
    w = drawn(40, 96)
    w[3] = 0
    parts = integers.to_parts("int8", w)
    assert (integers.to_float(parts) - w).abs().le(parts["weight_scale"][:, None] / 2 * 1.001).all()
    largest = parts["weight_int8"].abs().amax(dim=1)
    assert largest[3] == 0 and (largest[torch.arange(40) != 3] == 127).all()


@pytest.mark.parametrize(("width", "group"), [(256, 128), (352, 32), (192, 64), (96, 32)])
def test_int4_by_group_is_nearer_than_rounding_to_the_ends(width: int, group: int) -> None:
    w = drawn(24, width)
    parts = integers.to_parts("int4", w)
    assert parts["weight_int4"].shape == (24, width // 2) and parts["weight_scale"].shape == (24, width // group)
    groups = w.reshape(24, -1, group)
    low = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - low) / 15
    coarse = ((groups - low) / step).round() * step + low
    mine, plain = ((made.reshape_as(groups) - groups).square().sum(-1) for made in (integers.to_float(parts), coarse))
    assert (mine <= 1.05 * plain).all()  # scale and zero are rounded to bfloat16, plain rounding's are not
    assert mine.sum() < 0.98 * plain.sum()


@KINDS
def test_each_row_is_worked_out_by_itself(kind: str) -> None:
    count = 2 * integers.ROWS + 3
    w = drawn(count, 64) * torch.linspace(0.1, 2, count)[:, None]
    parts = integers.to_parts(kind, w)
    for number in (0, integers.ROWS - 1, integers.ROWS, count - 1):
        alone = integers.to_parts(kind, w[number : number + 1])
        assert all(torch.equal(parts[name][number], alone[name][0]) for name in parts)


# Layers


def linear(out: int, width: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out)


@KINDS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_layer_computes_with_the_rounded_weight(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    layer, x = linear(40, 352), torch.randn(3, 5, 352)
    weight, made = integers.to_float(integers.to_parts(kind, layer.weight)), quantized_linear(layer, kind, dtype)
    with torch.inference_mode():
        got, compilers = made(x.to(dtype)).float(), made.reduced(x[0].to(dtype))  # a compiler's way of few rows
    torch.testing.assert_close(got, F.linear(x, weight, layer.bias), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(compilers, F.linear(x[0], weight), atol=tolerance, rtol=tolerance)


def test_rounded_activations_are_for_many_rows_and_near() -> None:
    plain, rounding = (
        quantized_linear(linear(40, 128), "int8", torch.float32, int8_activations=on) for on in (False, True)
    )
    few, many = torch.randn(16, 128), torch.randn(17, 128)
    many[0, 0] = 50.0  # an outlier costs its own row alone
    with torch.inference_mode():
        assert torch.equal(plain(few), rounding(few))
        error = (plain(many) - rounding(many)).std(dim=1) / plain(many).std(dim=1)
    assert 0 < error[1:].max() < 0.02 < error[0] < 0.3


@pytest.mark.parametrize(("kind", "width", "error"), [("int8", 96, 0.02), ("int4", 128, 0.15), ("int4", 96, 0.02)])
def test_bitsandbytes_is_near(kind: str, width: int, error: float) -> None:
    """The last: NF4 doesn't take the width, so it is LLM.int8."""
    layer, x = linear(40, width), torch.randn(6, width)
    made = bitsandbytes_linear(layer, kind, torch.float32)
    with torch.inference_mode():
        assert (made(x) - layer(x)).std() / layer(x).std() < error


# The pass


@pytest.fixture(scope="module")
def vla() -> VLA:
    return random_vla(TINY, seed=1).eval()


@pytest.mark.parametrize(
    ("precision", "vision", "weights", "stored"), [("int8", False, 27.9, 27.9), ("int8", True, 25.4, 25.5), ("int4", True, 14.7, 15.4)]
)  # fmt: skip
def test_the_size_of_openvla_7b(precision: str, vision: bool, weights: float, stored: float) -> None:
    """In percent of float32: without the scales, and with them."""
    with torch.device("meta"):
        big = VLA(VLAConfig())
    float32 = stored_bytes(big)
    quantize(big, precision, vision=vision, dtype=torch.bfloat16)
    assert round(100 * stored_bytes(big) / float32, 1) == stored
    scales = sum(b.nbytes for name, b in big.named_buffers() if name.endswith(("weight_scale", "weight_zero")))
    assert round(100 * (stored_bytes(big) - scales) / float32, 1) == weights


def test_which_layers(vla: VLA) -> None:
    int8, int4 = plan(vla, "int8"), plan(vla, "int4")
    every = {name for name, module in vla.named_modules() if type(module) is nn.Linear}
    assert set(int8) == set(int4) == {name for name in every if "vision" not in name}
    fine = {name for name, kind in int4.items() if kind == "int4"}
    assert fine == {name for name in int8 if name.startswith("language_model.model.")}
    assert plan(vla, "int8", vision=True).keys() == every
    layer = cast(Any, copy.deepcopy(vla))
    layer.language_model.model.layers[0].mlp.down_proj = nn.Linear(360, 128)  # no group divides 360
    kinds = plan(layer, "int4")
    assert kinds["language_model.model.layers.0.mlp.down_proj"] == "int8"


@pytest.mark.parametrize(
    ("precision", "backend", "error"),
    [("int8", "torch", 0.02), ("int4", "torch", 0.3), ("int8", "bitsandbytes", 0.04), ("int4", "bitsandbytes", 0.3)],
)
def test_answers_stay_near_and_come_from_the_action_rows(vla: VLA, precision: str, backend: str, error: float) -> None:
    made = quantize(copy.deepcopy(vla), precision, backend).eval()
    torch.manual_seed(0)
    ids, pixels = torch.randint(4, 700, (3, 9)), torch.randn(3, 12, 128, 128)
    with torch.inference_mode():
        plain, rounded = vla(ids, None, pixels).logits, made(ids, None, pixels).logits
        assert 0 < (rounded - plain).std() / plain.std() < error
        head, hidden = made.language_model.lm_head, torch.randn(4, TINY.text_config.hidden_size)
        torch.testing.assert_close(action_logits(head, hidden, FIRST, LAST), head(hidden)[:, FIRST:LAST])
    answer = made.generate_action_ids(ids, pixels)
    assert ((answer >= FIRST) & (answer < LAST)).all()
    assert not any(parameter.requires_grad for parameter in made.parameters())
    half = quantize(copy.deepcopy(vla), precision, backend, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters() if p.is_floating_point()} == {torch.bfloat16}


def test_what_is_refused(vla: VLA) -> None:
    broken = copy.deepcopy(vla)
    broken.projector.fc2.weight.data[0, 0] = torch.inf
    for model, arguments, sentence in (
        (vla, ("int2",), "quantize 'int2' is unknown: use none, int8 or int4"),
        (vla, ("int8", "gptq"), "backend 'gptq' is unknown: use one of torch, bitsandbytes"),
        (add_lora(copy.deepcopy(vla), rank=2), ("int8",), "merge the adapter first"),
        (quantize(copy.deepcopy(vla), "int8"), ("int4",), "quantised already"),
        (quantize(copy.deepcopy(vla), "int8", "bitsandbytes"), ("int4",), "quantised already"),
        (broken, ("int8",), r"projector\.fc2: weights that hold NaN or infinity"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            quantize(model, *arguments)
