"""Weight-only quantisation as a pass over a built model, or over an empty one that a folder which holds it already then fills.

    int8   the decoder's linear layers, the head and the projector in 8 bits, a scale for each output channel
    int4   the decoder's linear layers in 4 bits, groups of 128 columns (64 or 32 where the width asks for it, int8 where none divides it);
           head and projector in int8

Embedding table, norms, biases, convolutions and the image towers stay as they are (the towers in int8 where asked for: they are 6 % of the
weights, and compute-bound). Adapters are merged before.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import torch
from msgspec import Meta
from torch import nn

from prismatic.errors import ConfigError
from prismatic.models.heads import HEADS
from prismatic.models.integers import group_size
from prismatic.models.quantized import QuantizedLinear, bitsandbytes_linear, quantized_linear
from prismatic.records import read_record

if TYPE_CHECKING:
    from prismatic.models.vla import VLA

PRECISIONS = ("int8", "int4")
BACKENDS = ("torch", "bitsandbytes")
HEAD, DECODER, VISION = "language_model.lm_head", "language_model.model.", "vision_backbone."  # where layers are
MADE_ALREADY = "this model is quantised already: build it anew from its checkpoint"


@dataclass(frozen=True)
class Saved:
    """What config.json says of a quantised folder: the parts of integers.py stand in the places of `…weight`."""

    precision: Literal["int8", "int4"]
    vision: bool  # whether the image towers are in int8
    format: Annotated[int, Meta(ge=1, le=1)]  # a later one is refused


class _Entries(TypedDict, total=False):
    quantization: Saved | None
    quantization_config: Any  # what transformers writes


def quantize(
    vla: "VLA",
    precision: str,
    backend: str = "torch",
    *,
    vision: bool = False,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    int8_activations: bool = False,
) -> "VLA":
    """Quantise a model without adapters, in place and layer by layer; returns it, frozen. An empty (meta) one is made ready to be filled.

    precision: int8 or int4. backend: torch or bitsandbytes (LLM.int8 and NF4, the head left out). vision: the image towers in int8 too.
    dtype: what is computed in and what the rest is cast to, None: the model's own. device: where it goes, each layer just before
    it is rounded, so that it never lies there whole; None: it stays. int8_activations: with many rows, as in the prompt's
    forward pass, int8 layers round their inputs too (W8A8). ConfigError for another name, a model with adapters or quantised already, or
    weights that hold NaN.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"quantisation backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    kinds, dtype = plan(vla, precision, vision=vision), dtype or next(vla.parameters()).dtype
    if backend == "bitsandbytes":
        kinds.pop(HEAD)  # as transformers does: decoding reads only some of its rows
    for name, kind in kinds.items():
        linear: Any = vla.get_submodule(name)
        if device:
            linear.to(device)
        try:
            if backend == "bitsandbytes":
                made = bitsandbytes_linear(linear, kind, dtype)
            else:
                made = quantized_linear(linear, kind, dtype, int8_activations=int8_activations)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        vla.set_submodule(name, made)
    for parameter in vla.parameters():
        if type(parameter) is nn.Parameter:  # not one of bitsandbytes'
            parameter.data = parameter.data.to(dtype)
    if device:
        vla.to(device)
    return vla.requires_grad_(False)


def plan(vla: "VLA", precision: str, *, vision: bool = False) -> dict[str, str]:
    """{name of a linear layer: int8 or int4} of all that are quantised. ConfigError as for quantize."""
    if precision not in PRECISIONS:
        raise ConfigError(f"quantize {precision!r} is unknown: use none, {' or '.join(PRECISIONS)}")
    kinds = {}
    for name, module in vla.named_modules():
        if ".base_layer" in name:
            raise ConfigError(
                "a model with an adapter on it can't be quantised: merge the adapter first (merge_lora, or export.py)"
            )
        if isinstance(module, QuantizedLinear):
            raise ConfigError(MADE_ALREADY)
        if not isinstance(module, nn.Linear) or name.startswith(HEADS) or (name.startswith(VISION) and not vision):
            continue
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:  # bitsandbytes'
            raise ConfigError(MADE_ALREADY)
        fine = precision == "int4" and name.startswith(DECODER) and group_size(module.in_features)
        kinds[name] = "int4" if fine else "int8"
    return kinds


def stored_bytes(vla: nn.Module) -> int:
    """Bytes that a model's weights take where it is, quantised or not: the parts that are really there, packing and scales included."""
    return sum(tensor.nbytes for tensor in vla.state_dict().values())


def saved_as(config: Path) -> Saved | None:
    """How the folder of this config.json is quantised; None: it isn't. ConfigError for another program's way, or a damaged entry."""
    entries = read_record(config, _Entries, way_out="export the folder again")
    if entries.get("quantization_config"):
        raise ConfigError(
            f"{config}: another program quantised this folder (quantization_config): give the checkpoint that it was made from"
        )
    return entries.get("quantization")


def refuse(config: Path, reason: str) -> None:
    """ConfigError if the folder of this config.json is quantised; reason: what stands against it."""
    if found := saved_as(config):
        raise ConfigError(
            f"{config.parent} is quantised to {found.precision}, but {reason}: give the checkpoint that it was made from"
        )


def choose(config: Path, precision: str, backend: str | None) -> tuple[str, str | None]:
    """Precision and backend for the folder of this config.json; backend None: nothing is quantised. ConfigError for what it can't be."""
    if precision not in ("none", *PRECISIONS):
        raise ConfigError(f"quantize {precision!r} is unknown: use none, {' or '.join(PRECISIONS)}")
    found, backend = saved_as(config), {None: "torch", "torchao": "torch"}.get(backend, backend)
    if found and (precision not in ("none", found.precision) or backend != "torch"):
        raise ConfigError(
            f"{config.parent} is quantised to {found.precision} for torch, not {precision} for {backend}: leave that out"
        )
    precision = found.precision if found else precision
    return precision, None if precision == "none" else backend
