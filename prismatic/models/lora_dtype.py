"""A pass over a VLA with float32 adapters on a bfloat16 base: they compute in bfloat16 and learn in float32. In: that VLA. Out: the same object.

By itself peft casts the *input* of every adapter up: a float32 copy of each activation, kept until the backward pass.
"""

from typing import Any

import peft
import torch
from torch import nn
from torch.nn import functional as F

from prismatic.models.lora import ADAPTER, lora_layers
from prismatic.models.vla import VLA


class CastLinear(nn.Linear):
    """A linear layer that computes in its input's dtype, whatever its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class CastConv2d(nn.Conv2d):
    """The same for a convolution."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.weight.to(input.dtype), None)


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


class AdaptedProduct(torch.autograd.Function):
    """x Wᵀ + bias + scaling · x Aᵀ Bᵀ, with W frozen: what the adapter adds is summed into the base's product, in both directions.

    Step by step each adapter would write its share, the scaled share and the sum, all as large as the output, and as much going back.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        in_place: bool,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = F.linear(rows, weight, bias)
        low = _scaled_product(rows, a.to(x.dtype).t(), scaling)  # (rows, rank)
        out = (out.addmm_ if in_place else out.addmm)(low, b.to(x.dtype).t())
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, low, weight, a, b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        of_low = _scaled_product(gradient, b.to(gradient.dtype), ctx.scaling)
        of_a = of_low.t().mm(rows).to(a.dtype)
        of_b = gradient.t().mm(low).to(b.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient.mm(weight).addmm_(of_low, a.to(gradient.dtype)).view(ctx.shape)
        return of_x, None, None, of_a, of_b, None, None


class AdaptedLinear(peft.tuners.lora.Linear):
    """peft's layer with the product above, while it trains in one dtype.

    sum_in_place False where the base's product is kept for recomputing: it must not change.
    """

    sum_in_place = True

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.merged or self.disable_adapters or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        base, scaling = self.get_base_layer(), self.scaling[ADAPTER]
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return AdaptedProduct.apply(x, base.weight, base.bias, a, b, scaling, self.sum_in_place)  # type: ignore[return-value]


def compute_in_base_dtype(vla: VLA) -> VLA:
    """Let adapters that are kept in float32 compute in the base's bfloat16, in place; returns vla. Gradients arrive in float32."""
    for _, layer in lora_layers(vla):
        layer.cast_input_dtype_enabled = False
        base = layer.get_base_layer()
        plain = type(layer) is peft.tuners.lora.Linear and type(base) is nn.Linear
        frozen = not any(parameter.requires_grad for parameter in base.parameters())
        if plain and frozen and isinstance(layer.lora_dropout[ADAPTER], nn.Identity):
            layer.__class__ = AdaptedLinear
            continue
        for half in (layer.lora_A, layer.lora_B):
            old: Any = half[ADAPTER]
            if isinstance(old, nn.Conv2d):
                sizes: dict[str, Any] = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
                new = CastConv2d(old.in_channels, old.out_channels, bias=False, device="meta", **sizes)
            else:
                new = CastLinear(old.in_features, old.out_features, bias=False, device="meta")
            new.weight = old.weight
            half[ADAPTER] = new
    return vla
