"""oneDNN in place of MKL: the same words on the same weights, and only where it pays."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from prismatic.models import onednn
from prismatic.models.decode import Decoder
from prismatic.models.lora import add_lora
from prismatic.models.onednn import OneDNNLinear, with_onednn
from prismatic.models.quantize import quantize
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import VLA
from tests.test_decode import hostile_drafts, lively, prompts  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch has no oneDNN",
)


class Products(TorchDispatchMode):
    """Counts the products that oneDNN makes, and keeps the widths of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.widths: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.mkldnn._linear_pointwise.default
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.ndim:
            self.widths.add(result.shape[-1])
        return result


def test_the_words_are_the_same_on_the_same_weights(lively: VLA, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(onednn, "WORTHWHILE", 0)
    fast = with_onednn(lively)
    ids, mask, pixels = prompts(3)
    expected = Decoder(lively)(ids, pixels, 7, mask).ids
    assert len({tuple(row.tolist()) for row in expected}) == 3
    with Products() as products:
        assert Decoder(fast)(ids, pixels, 7, mask).ids.equal(expected)
    assert TINY.text_config.vocab_size not in products.widths  # of the head, only the action rows
    assert products.count > 7 * 7 * TINY.text_config.num_hidden_layers  # each of a layer's products in each pass
    for name, draft in hostile_drafts(expected).items():
        assert Decoder(fast)(ids, pixels, 7, mask, draft).ids.equal(expected), name
    ours = dict(fast.named_parameters())
    assert all(ours[name] is parameter for name, parameter in lively.named_parameters())
    assert not any(isinstance(part, OneDNNLinear) for part in lively.modules())


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_linear_whatever_the_layout(bias: bool) -> None:
    layer = nn.Linear(64, 48, bias=bias)
    x = torch.randn(64, 512, 5).permute(2, 1, 0)  # neither contiguous nor flat
    with torch.inference_mode(), Products() as products:
        torch.testing.assert_close(with_onednn(layer)(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
    assert products.count == 1


def test_small_products_stay_where_they_are() -> None:
    layer = with_onednn(nn.Linear(128, 128))
    for rows, expected in ((onednn.WORTHWHILE // 128**2, 1), (onednn.WORTHWHILE // 128**2 - 1, 0)):
        with torch.inference_mode(), Products() as products:
            layer(torch.randn(1, rows, 128))
        assert products.count == expected


def test_layers_of_other_kinds_stay_as_they_are() -> None:
    def swapped(vla: nn.Module) -> set[str]:
        return {name for name, part in with_onednn(vla).named_modules() if isinstance(part, OneDNNLinear)}

    vla = random_vla(TINY, seed=0).eval()
    everything = {name for name, part in vla.named_modules() if isinstance(part, nn.Linear)}
    assert swapped(vla) == everything
    assert not swapped(random_vla(TINY, seed=0).bfloat16())
    towers = {name for name in everything if name.startswith("vision_backbone.")}
    assert swapped(quantize(random_vla(TINY, seed=0).eval(), "int8")) == towers
    adapted = swapped(add_lora(vla, rank=2))
    assert adapted and all("lora_" in name or name.endswith("base_layer") for name in adapted)
