"""Linear weights as small integers: plain tensors, worked out in float32 whatever the weights are, so alike on every device.

    int8   weight_int8 (out, in) int8, weight_scale (out,) float32                       W ≈ int8 · scale
    int4   weight_int4 (out, in/2) uint8, weight_scale, weight_zero (out, in/group) bfloat16   W ≈ (nibble - 8) · scale + zero

These names, behind a layer's own, are what a quantised folder holds. Column 2j is the high nibble of byte j, column 2j + 1 the low one.
"""

import torch

from prismatic.errors import ConfigError

LARGEST_INT8, LARGEST_NIBBLE, MIDDLE_NIBBLE = 127, 15, 8
# columns that share a scale in int4, the first that divides the width: those that the kernels know
GROUPS = (128, 64, 32)
# of a group's range: cutting its ends off can cost less than coarse steps
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
ROWS = 128  # worked out at a time: a CPU's caches hold the float32 steps in between
SMALLEST = 1e-8  # scale of a row or group of zeros

Parts = dict[str, torch.Tensor]


def group_size(width: int) -> int | None:
    """Columns that share a scale in int4; None: this width can't be int4 and stays int8."""
    return next((size for size in GROUPS if width % size == 0), None)


def to_parts(kind: str, weight: torch.Tensor) -> Parts:
    """(out, in) weight → its parts on the same device, of an empty (meta) one empty; kind int8 or int4. ConfigError for NaN or infinity."""
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ConfigError("weights that hold NaN or infinity can't be quantised: take another checkpoint")
    make = _to_int8 if kind == "int8" else _to_int4
    rows_at_once = ROWS if weight.device.type == "cpu" else len(weight)
    pieces = [make(rows.float()) for rows in weight.detach().split(rows_at_once)]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _to_int8(weight: torch.Tensor) -> Parts:
    """Symmetric, a scale for each row; the largest weight of a row is ±127."""
    scale = (weight.abs().amax(dim=1) / LARGEST_INT8).clamp_min(SMALLEST)
    return {"weight_int8": (weight / scale[:, None]).round().to(torch.int8), "weight_scale": scale}


def _to_int4(weight: torch.Tensor) -> Parts:
    """Sixteen levels between a group's ends, or within: the range of SHRINKS with the least squared error, group by group."""
    out, width = weight.shape
    groups = weight.reshape(out, -1, group_size(width) or width)  # (out, groups, group)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    least = torch.full_like(low, torch.inf)
    nibbles = torch.zeros_like(groups, dtype=torch.uint8)
    scale, zero = torch.zeros_like(low, dtype=torch.bfloat16), torch.zeros_like(low, dtype=torch.bfloat16)
    for shrink in SHRINKS[:1] if weight.is_meta else SHRINKS:
        step = ((high - low) * shrink / LARGEST_NIBBLE).clamp_min(SMALLEST).bfloat16()
        middle = ((high + low) / 2 + step.float() / 2).bfloat16()  # what nibble 8 stands for
        near = ((groups - middle.float()[..., None]) / step.float()[..., None]).round() + MIDDLE_NIBBLE
        near = near.clamp(0, LARGEST_NIBBLE)
        error = ((near - MIDDLE_NIBBLE) * step.float()[..., None] + middle.float()[..., None] - groups).square().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, step, scale), torch.where(better, middle, zero)
        nibbles = torch.where(better[..., None], near.to(torch.uint8), nibbles)
    nibbles = nibbles.reshape(out, width)
    return {"weight_int4": nibbles[:, ::2] << 4 | nibbles[:, 1::2], "weight_scale": scale, "weight_zero": zero}


def to_float(parts: Parts) -> torch.Tensor:
    """The (out, in) float32 weight that parts stand for."""
    if "weight_int8" in parts:
        return parts["weight_int8"].float() * parts["weight_scale"][:, None]
    scale, zero = parts["weight_scale"].float()[..., None], parts["weight_zero"].float()[..., None]
    packed = parts["weight_int4"]
    nibbles = torch.stack([packed >> 4, packed & LARGEST_NIBBLE], dim=-1).reshape(*parts["weight_scale"].shape, -1)
    return ((nibbles.float() - MIDDLE_NIBBLE) * scale + zero).flatten(1)
