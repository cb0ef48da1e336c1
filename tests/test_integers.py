"""Weights as integers: errors within half a step, packing that can be undone, and the formula of the kernels that will read them."""

import pytest
import torch

from prismatic.errors import ConfigError
from prismatic.models import integers


def weight(out: int, width: int) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(0))


def test_int8_is_off_by_half_a_step_at_most_and_uses_the_whole_range() -> None:
    w = weight(40, 96)
    w[3] = 0
    parts = integers.to_parts("int8", w)
    assert (integers.to_float(parts) - w).abs().le(parts["weight_scale"][:, None] / 2 * 1.001).all()
    largest = parts["weight_int8"].abs().amax(dim=1)
    assert largest[3] == 0 and (largest[torch.arange(40) != 3] == 127).all()


@pytest.mark.parametrize(("width", "group"), [(256, 128), (352, 32), (192, 64), (96, 32)])
def test_int4_by_group(width: int, group: int) -> None:
    w = weight(24, width)
    parts = integers.to_parts("int4", w)
    assert {name: (tuple(t.shape), t.dtype) for name, t in parts.items()} == integers.layout("int4", 24, width)
    assert parts["weight_scale"].shape == (24, width // group)
    groups = w.reshape(24, -1, group)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    coarse = ((groups - groups.amin(-1, keepdim=True)) / step[..., None]).round() * step[..., None] + groups.amin(
        -1, keepdim=True
    )
    errors = [(made.reshape_as(groups) - groups).square().sum(-1) for made in (integers.to_float(parts), coarse)]
    assert (errors[0] <= 1.05 * errors[1]).all()  # scale and zero are rounded to bfloat16, plain rounding's are not
    assert errors[0].sum() < 0.98 * errors[1].sum()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_each_row_is_worked_out_by_itself(kind: str) -> None:
    w = weight(2 * integers.ROWS + 3, 64) * torch.linspace(0.1, 2, 2 * integers.ROWS + 3)[:, None]
    parts = integers.to_parts(kind, w)
    for number in (0, integers.ROWS - 1, integers.ROWS, len(w) - 1):
        alone = integers.to_parts(kind, w[number : number + 1])
        assert all(torch.equal(parts[name][number], alone[name][0]) for name in parts)


def test_a_width_that_no_group_divides_stays_int8() -> None:
    assert integers.group_size(48) is None and integers.group_size(11008) == 128


def test_nibbles_come_out_as_they_went_in() -> None:
    nibbles = torch.arange(64, dtype=torch.uint8).reshape(2, 32) % 16
    packed = nibbles[:, ::2] << 4 | nibbles[:, 1::2]
    assert torch.equal(integers.unpacked({"weight_int4": packed}), nibbles)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_nan_is_refused(kind: str) -> None:
    w = weight(8, 128)
    w[1, 1] = torch.nan
    with pytest.raises(ConfigError, match="NaN or infinity"):
        integers.to_parts(kind, w)
