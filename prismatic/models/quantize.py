"""Weight-only quantisation as a pass over a built model, or of a folder that holds it already. In: a VLA. Out: the same object.

    int8   the decoder's linear layers, the head and the projector in 8 bits, a scale for each output channel
    int4   the decoder's linear layers in 4 bits, groups of 128 columns (64 or 32 where the width asks for it, int8 where none divides it);
           head and projector in int8

Embedding table, norms, biases, convolutions and the image towers stay as they are (the towers in int8 where asked for: they are 6 % of the
weights, and compute-bound). Adapters are merged before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prismatic.errors import ConfigError
from prismatic.models import backends, integers, weights
from prismatic.models.heads import HEADS
from prismatic.models.quantized import QUANTIZED, quantized_linear
from prismatic.records import read_object

if TYPE_CHECKING:
    from prismatic.models.vla import VLA

PRECISIONS = ("int8", "int4")
HEAD, DECODER, VISION = "language_model.lm_head", "language_model.model.", "vision_backbone."  # where layers are
ENTRY, FORMAT = (
    "quantization",
    1,
)  # the key of config.json, and what it describes: the parts of integers.py in the places of `…weight`
SAVED_FOR = "torch"  # the backend that such a folder loads for
FOREIGN_ENTRY = "quantization_config"  # what transformers writes


@dataclass(frozen=True)
class Saved:
    """What config.json says of a quantised folder."""

    precision: str
    vision: bool  # whether the image towers are in int8

    def to_json(self) -> dict[str, Any]:
        return {ENTRY: {"format": FORMAT, "precision": self.precision, "vision": self.vision}}


def with_vision(precision: str, vision: bool | None = None) -> bool:
    """Whether the image towers are quantised too; None: no."""
    return bool(vision)


def default_backend(device: torch.device) -> str:
    """torch on every device: on a CPU for correctness; on a GPU because weight-only kernels read fewer bytes, while LLM.int8 was slower
    than bfloat16 in every published measurement. Neither has been measured here on a GPU.
    """
    return "torch"


def quantize(
    vla: "VLA",
    precision: str,
    backend: str | None = None,
    *,
    vision: bool | None = None,
    dtype: torch.dtype | None = None,
    int8_activations: bool = False,
) -> "VLA":
    """Quantise a model without adapters, in place and layer by layer; returns it, frozen.

    precision: int8 or int4. backend: torch or bitsandbytes (LLM.int8 and NF4, the head left out), None: default_backend. vision: the image
    towers in int8 too. dtype: what is computed in and what the rest is cast to, None: the model's own. int8_activations: with many rows,
    as in the prompt's forward pass, int8 layers round their inputs too (W8A8). ConfigError for another name, a model with adapters or
    quantised already, weights that hold NaN, or a dtype or GPU that int4's kernel doesn't take.
    """
    kinds = plan(vla, precision, vision=vision)
    first = next(vla.parameters())
    backend, dtype = (
        backends.OLD_NAME.get(backend or "", backend) or default_backend(first.device),
        dtype or first.dtype,
    )
    if backend not in backends.BACKENDS:
        raise ConfigError(f"quantisation backend {backend!r} is unknown: use one of {', '.join(backends.BACKENDS)}")
    if backend == "bitsandbytes":
        kinds.pop(HEAD)  # as transformers does: decoding reads only some of its rows
    for name, kind in kinds.items():
        linear: Any = vla.get_submodule(name)
        if backend == "bitsandbytes":
            vla.set_submodule(name, backends.bitsandbytes_linear(linear, kind, dtype))
        else:
            parts = _parts(linear, name, kind)
            vla.set_submodule(name, quantized_linear(parts, linear.bias, dtype, int8_activations=int8_activations))
    for parameter in vla.parameters():
        if type(parameter) is nn.Parameter:  # not one of bitsandbytes'
            parameter.data = parameter.data.to(dtype)
    return vla.requires_grad_(False)


def plan(vla: "VLA", precision: str, *, vision: bool | None = None) -> dict[str, str]:
    """{name of a linear layer: int8 or int4} of all that are quantised. ConfigError as for quantize."""
    if precision not in PRECISIONS:
        raise ConfigError(f"quantize {precision!r} is unknown: use none, {' or '.join(PRECISIONS)}")
    kinds = {}
    for name, module in vla.named_modules():
        if ".base_layer" in name:
            raise ConfigError(
                "a model with an adapter on it can't be quantised: merge the adapter first (merge_lora, or export.py)"
            )
        if isinstance(module, QUANTIZED):
            raise ConfigError("this model is quantised already: build it anew from its checkpoint")
        if (
            not isinstance(module, nn.Linear)
            or name.startswith(HEADS)
            or (name.startswith(VISION) and not with_vision(precision, vision))
        ):
            continue
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
            raise ConfigError("this model is quantised already: build it anew from its checkpoint")
        fine = precision == "int4" and name.startswith(DECODER) and integers.group_size(module.in_features)
        kinds[name] = "int4" if fine else "int8"
    return kinds


def _parts(linear: nn.Linear, name: str, kind: str) -> integers.Parts:
    try:
        return integers.to_parts(kind, linear.weight)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def layout(
    vla: "VLA", saved: Saved, dtype: torch.dtype = torch.bfloat16
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name → shape and number format of every tensor of a quantised folder, for a (meta) model; dtype: of what is not quantised."""
    kinds = plan(vla, saved.precision, vision=saved.vision)
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, tensor in vla.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in kinds and layer != name:
            found |= {f"{layer}.{part}": what for part, what in integers.layout(kinds[layer], *tensor.shape).items()}
        else:
            found[name] = (tuple(tensor.shape), dtype)
    return found


def layout_bytes(vla: "VLA", saved: Saved, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the tensors of such a folder, by arithmetic."""
    return sum(torch.Size(shape).numel() * number.itemsize for shape, number in layout(vla, saved, dtype).values())


def stored_bytes(vla: nn.Module) -> int:
    """Bytes that a model's weights take where it is, quantised or not: the parts that are really there, packing and scales included."""
    return sum(tensor.nbytes for tensor in vla.state_dict().values())


def take_state(vla: "VLA", saved: Saved, *, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a quantised folder, out of a float model that is emptied meanwhile, so that memory never holds it twice."""
    kinds = plan(vla, saved.precision, vision=saved.vision)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in vla.state_dict(keep_vars=True).items():
        layer = name.removesuffix(".weight")
        if layer in kinds and layer != name:
            linear: Any = vla.get_submodule(layer)
            state |= {f"{layer}.{part}": value for part, value in _parts(linear, layer, kinds[layer]).items()}
            tensor.data = torch.empty(0)
        else:
            state[name] = tensor.detach().to(dtype)
    return state


def saved_as(config: Path) -> Saved | None:
    """How the folder of this config.json is quantised; None: it isn't. ConfigError for another program's way, or a damaged entry."""
    raw = read_object(config)
    if raw.get(FOREIGN_ENTRY):
        raise ConfigError(
            f"{config}: another program quantised this folder ({FOREIGN_ENTRY}): give the checkpoint that it was made from"
        )
    entry = raw.get(ENTRY)
    if entry is None:
        return None
    known = isinstance(entry, dict) and entry.get("format") == FORMAT and entry.get("precision") in PRECISIONS
    if not known or not isinstance(entry.get("vision"), bool):
        raise ConfigError(f"{config}: {ENTRY} {entry!r} is damaged or of a later version: export the folder again")
    return Saved(entry["precision"], entry["vision"])


def refuse(config: Path, reason: str) -> None:
    """ConfigError if the folder of this config.json is quantised; reason: what stands against it."""
    if found := saved_as(config):
        raise ConfigError(
            f"{config.parent} is quantised to {found.precision}, but {reason}: give the checkpoint that it was made from"
        )


def choose(config: Path, precision: str, backend: str | None, device: str) -> tuple[str, str | None]:
    """Precision and backend for the folder of this config.json; backend None: nothing is quantised. ConfigError for what it can't be."""
    if precision not in ("none", *PRECISIONS):
        raise ConfigError(f"quantize {precision!r} is unknown: use none, {' or '.join(PRECISIONS)}")
    found = saved_as(config)
    backend = backends.OLD_NAME.get(backend or "", backend) or default_backend(torch.device(device))
    if found and (precision not in ("none", found.precision) or backend != SAVED_FOR):
        raise ConfigError(
            f"{config.parent} is quantised to {found.precision} for {SAVED_FOR}, not {precision} for {backend}: leave that out"
        )
    precision = found.precision if found else precision
    return precision, None if precision == "none" else backend


def fill(
    vla: "VLA",
    stored: Mapping[str, weights.StoredTensor],
    saved: Saved,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Fill a (meta) model from the tensors of a quantised folder, one layer at a time; dtype: what is computed in.

    ConfigError for a part in another number format, or scales that hold NaN.
    """
    expected = layout(vla, saved)
    rest = dict(stored)
    parts: dict[str, integers.Parts] = {}
    for name, (_, number) in expected.items():
        layer, _, part = name.rpartition(".")
        if not part.startswith("weight_"):
            continue
        tensor = rest.pop(name).read()
        if tensor.dtype != number:
            raise ConfigError(
                f"{stored[name].file}: tensor {name} is {tensor.dtype}, not {number}: copy the folder again"
            )
        if number.is_floating_point and not torch.isfinite(tensor).all():
            raise ConfigError(f"{stored[name].file}: tensor {name} holds NaN or infinity: copy the folder again")
        parts.setdefault(layer, {})[part] = tensor
    weights.fill(vla, rest, dtype=dtype, device=device)
    for layer, tensors in parts.items():
        linear: Any = vla.get_submodule(layer)
        there = {part: tensor.to(device, copy=True) for part, tensor in tensors.items()}
        vla.set_submodule(layer, quantized_linear(there, linear.bias, dtype))
    vla.requires_grad_(False)
