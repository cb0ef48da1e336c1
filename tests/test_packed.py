"""Packed weights: the same answers, from oneDNN."""

import copy

import pytest
import torch
from torch import nn

from prismatic.models.packed import PackedLinear, pack
from tests.test_decode import lively, prompts  # noqa: F401  (a fixture)


def test_a_packed_model_answers_the_same(lively) -> None:  # noqa: F811
    packed = pack(copy.deepcopy(lively))
    kinds = {name: type(module) for name, module in packed.named_modules()}
    assert PackedLinear is kinds["language_model.model.layers.3.mlp.down_proj"] is kinds["projector.fc1"]
    assert kinds["language_model.lm_head"] is nn.Linear
    assert not any(kind is nn.Linear for name, kind in kinds.items() if not name.endswith("lm_head"))
    ids, mask, pixels = prompts(4)
    assert packed.generate_action_ids(ids, pixels, 7, mask).equal(lively.generate_action_ids(ids, pixels, 7, mask))


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_map_is_that_map(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(30, 50, bias=bias)
    x = torch.randn(2, 7, 30)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x))


def test_only_plain_float32_maps_are_packed() -> None:
    class Other(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"half": nn.Linear(4, 4, dtype=torch.bfloat16), "other": Other(4, 4), "meta": nn.Linear(4, 4, device="meta")}
    )
    assert not any(isinstance(module, PackedLinear) for module in pack(model).modules())
