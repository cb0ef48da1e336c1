"""An adapter on a built model ↔ the files of its folder, as peft 0.11.1 (the original's) writes and reads them, with what this project puts beside.

In: a VLA with LoRA. Out: a folder that appears whole or not at all; or a VLA with the adapter folded into its weights. Surprising: the original's
peft also stores the whole `lm_head` base weight, which is compared with the base's when reading and not written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prismatic.adapter_config import read_adapter_config
from prismatic.atomic import whole_folder
from prismatic.errors import ConfigError
from prismatic.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIONS, PROCESSOR, STATISTICS, VERSIONS
from prismatic.head_files import save_heads
from prismatic.models import weights
from prismatic.models.heads import HEADS
from prismatic.models.lora import ADAPTER, inject, lora_layers
from prismatic.models.vla import VLA
from prismatic.processor import Processor
from prismatic.versions import versions

FILE_PREFIX = "base_model.model."  # what peft puts before every name in adapter_model.safetensors
PLAIN_FIELDS = {  # fields of adapter_config.json that peft 0.11.1 knows and that always have this value here
    "alpha_pattern": {}, "auto_mapping": None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": "gaussian", "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "rank_pattern": {},
    "revision": None, "task_type": None, "use_dora": False, "use_rslora": False,
}  # fmt: skip


def lora_state_dict(vla: VLA) -> dict[str, torch.Tensor]:
    """Adapter tensors under the names that peft's file has: `base_model.model.….lora_A.weight`."""
    return {
        FILE_PREFIX + name.replace(f".{ADAPTER}.", "."): tensor
        for name, tensor in vla.state_dict().items()
        if ".lora_A." in name or ".lora_B." in name
    }


def merge_lora(vla: VLA) -> VLA:
    """Fold every adapter into its base weight, computed in float32, and take the adapters away; in place, returns vla. Names are plain again."""
    for name, layer in list(lora_layers(vla)):
        base = layer.get_base_layer()
        with torch.no_grad():
            delta = layer.get_delta_weight(ADAPTER).float()
            base.weight.copy_((base.weight.float() + delta).to(base.weight.dtype))
        vla.set_submodule(name, base)
    return vla


def save_adapter(
    folder: Path, vla: VLA, *, processor: Processor, statistics: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Write adapter weights and config, processor, statistics, options of the run and versions. An existing folder is replaced."""
    with whole_folder(folder) as partial:
        _, layer = next(lora_layers(vla))
        tensors = {name: tensor.detach().float().contiguous().cpu() for name, tensor in lora_state_dict(vla).items()}
        weights.save_tensors(tensors, partial / ADAPTER_WEIGHTS)
        save_heads(partial, {name: t.float() for name, t in vla.state_dict().items() if name.startswith(HEADS)})
        config = PLAIN_FIELDS | {
            "base_model_name_or_path": processor.config.base_model,
            "r": layer.r[ADAPTER],
            "lora_alpha": layer.lora_alpha[ADAPTER],
            "lora_dropout": getattr(layer.lora_dropout[ADAPTER], "p", 0.0),
            "target_modules": sorted({name.rpartition(".")[2] for name, _ in lora_layers(vla)}),
        }
        config = dict(sorted(config.items()))
        files = {ADAPTER_CONFIG: config, STATISTICS: statistics, OPTIONS: options, VERSIONS: versions()}
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2, default=str))
        (partial / PROCESSOR).write_text(processor.config.to_json())


def load_adapter(vla: VLA, folder: Path, *, dtype: torch.dtype) -> VLA:
    """Put the adapter of a folder onto a built model, in place; only the adapter is trainable then. Returns vla.

    ConfigError for a kind of adapter that this is not, tensors that don't fit, or a model that has an adapter.
    """
    if next(lora_layers(vla), None):
        raise ConfigError(
            f"{folder} can't go onto a model that has an adapter already: merge that one first with export.py"
        )
    stored = _own_tensors(vla, folder)
    lora = read_adapter_config(folder, {name.partition(".lora_")[0] for name in stored})
    try:
        inject(vla, lora)
    except ValueError as error:  # no such module
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{folder / ADAPTER_CONFIG}: {reason}: give the adapter's own base") from None
    places = {name.removeprefix(FILE_PREFIX): tensor for name, tensor in lora_state_dict(vla).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in places.items()}
    weights.check_names(shapes, stored, folder, described_by=ADAPTER_CONFIG)
    for name, tensor in stored.items():
        half, letter = name.removesuffix(".weight").rsplit(".", 1)
        parameter = vla.get_parameter(f"{half}.{letter}.{ADAPTER}.weight")
        parameter.data = tensor.load(name, dtype=dtype, device=parameter.device, may_be_zero=True)
    return vla


def _own_tensors(vla: VLA, folder: Path) -> dict[str, weights.StoredTensor]:
    """The adapter's own tensors. peft adds some of the base's (lm_head, where that is adapted): they tell whether this is that base."""
    stored = {name.removeprefix(FILE_PREFIX): tensor for name, tensor in weights.adapter_tensors(folder).items()}
    base = vla.state_dict()
    for name in [name for name in stored if ".lora_" not in name]:
        there = base.get(name.replace(".base_layer.", "."))
        if there is not None:
            kept = stored.pop(name).read()
            # one that is cut up among processes is looked at by the first of them alone
            if not hasattr(there, "placements") and _differs(kept.cpu(), there.detach().cpu()):
                raise ConfigError(
                    f"{folder} was trained on another base: its file holds that one's {name}, which differs from this one's: give that base, "
                    "not one with the adapter merged into it already"
                )
    return stored


def _differs(kept: torch.Tensor, there: torch.Tensor) -> bool:
    """Whether two tensors differ by more than rounding."""
    half = next((t.dtype for t in (kept, there) if t.dtype != torch.float32), torch.float32)
    tolerated = 0.001 if kept.dtype == there.dtype else 0.1  # share of values: rounded twice, a few differ
    return kept.shape != there.shape or bool((kept.to(half) != there.to(half)).float().mean() > tolerated)
