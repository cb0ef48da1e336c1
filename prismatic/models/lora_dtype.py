"""A pass over a VLA with float32 adapters on a bfloat16 base: they compute in bfloat16 and learn in float32. In: that VLA. Out: the same object.

By itself peft casts the *input* of every adapter up: a float32 copy of each activation, kept until the backward pass. (The two patch
convolutions stay as peft has them: their inputs are pixels.)
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.models.lora import ADAPTER, lora_layers
from prismatic.models.vla import VLA


class _Cast(torch.autograd.Function):
    """A half of an adapter that was cast before. Its gradient is cast back at once: behind one shared cast all of them would wait for the end of
    the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, half: torch.Tensor, cast: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.dtype = half.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.to(ctx.dtype), None


class AdaptedLinear(nn.Module):
    """Mixed into peft's layer around a linear one: x Wᵀ + bias + scaling · x Aᵀ Bᵀ in x's dtype, what the adapter adds summed into one product.

    casts: the adapter's halves in base_dtype, while cast_once holds.
    """

    base_dtype: torch.dtype
    casts: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.merged or self.disable_adapters or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        halves = halves_of(self)
        a, b = map(_Cast.apply, halves, self.casts) if self.casts else (half.to(x.dtype) for half in halves)
        out = self.base_layer(x)
        low = F.linear(self.lora_dropout[ADAPTER](x), a)  # (…, rank)
        summed = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), b.t(), alpha=self.scaling[ADAPTER])
        return summed.view_as(out)


@functools.cache
def _adapted(kind: type) -> type:
    return type(f"Adapted{kind.__name__}", (AdaptedLinear, kind), {})


def compute_in_base_dtype(vla: VLA) -> VLA:
    """Let adapters of linear layers that are kept in float32 compute in the base's bfloat16, in place; returns vla. Gradients arrive in float32."""
    frozen = (p for p in vla.parameters() if not p.requires_grad)
    dtype = next(p.dtype for p in frozen if p.is_floating_point())  # packed 4-bit weights are integers
    for _, layer in lora_layers(vla):
        if isinstance(layer.get_base_layer(), nn.Linear):
            layer.__class__, layer.base_dtype = _adapted(type(layer)), dtype
    return vla


def casting_layers(vla: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) whose adapter cast_once copies."""
    return ((name, layer) for name, layer in lora_layers(vla) if isinstance(layer, AdaptedLinear))


def halves_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of an adapter."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


@contextlib.contextmanager
def cast_once(vla: nn.Module) -> Iterator[None]:
    """Cast the adapters for all forward and backward passes of one step: in each pass it would be 1,750 small kernels of openvla-7b. What is
    inside must not change them.
    """
    for _, layer in casting_layers(vla):
        layer.casts = tuple(half.detach().to(layer.base_dtype) for half in halves_of(layer))
    try:
        yield
    finally:
        for _, layer in casting_layers(vla):
            layer.casts = None
