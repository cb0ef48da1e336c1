"""A pass over a VLA with float32 adapters on a bfloat16 base: they compute in bfloat16 and learn in float32. In: that VLA. Out: the same object.

By itself peft casts the *input* of every adapter up: a float32 copy of each activation, kept until the backward pass.
"""

import contextlib
from collections.abc import Iterator
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


CAST = {nn.Linear: CastLinear, nn.Conv2d: CastConv2d}


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


class AdaptedProduct(torch.autograd.Function):
    """x Wᵀ + bias + scaling · x Aᵀ Bᵀ, with W frozen: what the adapter adds is summed into the base's product, in both directions.

    Step by step each adapter would write its share, the scaled share and the sum, all as large as the output, and as much going back.
    cast_a, cast_b: A and B in x's dtype, where they are at hand; else each direction casts them.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        cast_a: torch.Tensor | None,
        cast_b: torch.Tensor | None,
        scaling: float,
        in_place: bool,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = F.linear(rows, weight, bias)
        low = _scaled_product(rows, _cast(a, cast_a, x.dtype).t(), scaling)  # (rows, rank)
        out = (out.addmm_ if in_place else out.addmm)(low, _cast(b, cast_b, x.dtype).t())
        ctx.save_for_backward(rows, low, weight, a, b, cast_a, cast_b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, low, weight, a, b, cast_a, cast_b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        of_low = _scaled_product(gradient, _cast(b, cast_b, gradient.dtype), ctx.scaling)
        of_a = of_low.t().mm(rows).to(a.dtype)
        of_b = gradient.t().mm(low).to(b.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient.mm(weight).addmm_(of_low, _cast(a, cast_a, gradient.dtype)).view(ctx.shape)
        return of_x, None, None, of_a, of_b, None, None, None, None


def _cast(half: torch.Tensor, at_hand: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return half.to(dtype) if at_hand is None else at_hand


class AdaptedLinear(peft.tuners.lora.Linear):
    """peft's layer with the product above, while it trains in one dtype.

    sum_in_place False where the base's product is kept for recomputing: it must not change. casts: the adapter's halves in the base's dtype,
    while cast_once holds.
    """

    sum_in_place = True
    casts: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.merged or self.disable_adapters or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        base, scaling = self.get_base_layer(), self.scaling[ADAPTER]
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        inputs = (x, base.weight, base.bias, a, b, *self.casts, scaling, self.sum_in_place)
        return AdaptedProduct.apply(*inputs)  # type: ignore[return-value]


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
            half[ADAPTER].__class__ = CAST[type(half[ADAPTER])]
    return vla


def casting_layers(vla: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """(name, layer) whose adapter cast_once copies."""
    return ((name, layer) for name, layer in lora_layers(vla) if isinstance(layer, AdaptedLinear))


def halves_of(layer: AdaptedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of an adapter."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def cast_once(vla: nn.Module) -> Iterator[None]:
    """Cast the adapters together, for all forward and backward passes of one step: one by one it would be 1,750 small kernels a pass of
    openvla-7b. What is inside must not change them.
    """
    layers: list[Any] = [layer for _, layer in casting_layers(vla)]
    halves = [half.detach() for layer in layers for half in halves_of(layer)]
    dtypes = [layer.get_base_layer().weight.dtype for layer in layers for _ in range(2)]
    casts = [torch.empty_like(half, dtype=dtype) for half, dtype in zip(halves, dtypes, strict=True)]
    if halves:
        torch._foreach_copy_(casts, halves)  # pyright: ignore[reportPrivateImportUsage]
    for layer, *pair in zip(layers, casts[::2], casts[1::2], strict=True):
        layer.casts = tuple(pair)
    try:
        yield
    finally:
        for layer in layers:
            layer.casts = (None, None)
