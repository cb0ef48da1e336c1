"""Folders of weights: what their files are called, and how a model, a processor or a policy comes out of one.

A checkpoint folder is OpenVLA's own (`config.json`, safetensors, tokenizer, preprocessor, `dataset_statistics.json`) or the native Prismatic
layout; an adapter folder has `adapter_config.json`.
"""

import copy
import dataclasses
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prismatic.adapter import load_adapter, merge_lora
from prismatic.atomic import whole_folder
from prismatic.errors import ConfigError
from prismatic.filenames import ADAPTER_CONFIG, CONFIG, PREPROCESSOR, PROCESSOR, STATISTICS, TOKENIZER, TOKENIZER_FILES
from prismatic.head_files import model_config, refuse_merged, save_heads, stored_heads
from prismatic.hub import resolve
from prismatic.machine import available_memory, uses_gpu
from prismatic.models import quantize as quantization
from prismatic.models import weights
from prismatic.models.compiled import decoder_for
from prismatic.models.config_file import config_json
from prismatic.models.heads import HEADS
from prismatic.models.nf4 import prepare_nf4
from prismatic.models.vla import VLA
from prismatic.policy import VLAPolicy
from prismatic.policy_metadata import describe
from prismatic.processor import Processor
from prismatic.processor_files import load_processor, preprocessor_json
from prismatic.processor_json import processor_home, read_processor
from prismatic.ranges import expanded
from prismatic.records import read_bytes, read_object

ROUNDING_BYTES = 3 * 2**30  # of a GPU's memory, what rounding a layer takes beside the whole; not measured
UNSAID = ("num_actions_chunk", "num_images_in_input")  # what a published folder with a head of chunks doesn't say


def load_vla(
    checkpoint: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    adapter_dtype: torch.dtype | None = None,
    shard: Callable[[VLA], None] | None = None,
    nf4: bool = False,
    new_heads: bool = False,
    **choice: Any,
) -> VLA:
    """A model from a checkpoint folder or hub id, with an adapter on it if one is given (then only the adapter is trainable).

    adapter_dtype: None means dtype. Training keeps its adapter in float32 on a bfloat16 base.
    shard: is given the model while it is empty, so that no process ever holds all of one that is cut up among several.
    nf4: pack the base's linear layers into 4 bits while loading (see models/nf4.py); dtype is then what is computed in.
    choice: action_head, num_actions_chunk, num_images_in_input, proprio_dim, stop_token: what a foreign folder does not say (see head_files.py).
    new_heads: the choice counts more than the folder, and a head that has no file starts at random, for training. Heads take adapter_dtype.

    ConfigError, before anything is loaded, for a missing, surplus or mis-shaped tensor, a truncated file, or an adapter of another base.
    A folder that export.py quantised comes out quantised (and frozen), and takes no adapter.
    """
    folder = resolve(checkpoint)
    adapter = None if adapter is None else resolve(adapter)
    if (folder / ADAPTER_CONFIG).exists():
        raise ConfigError(f"{folder} is an adapter: give its base as the checkpoint and this folder as the adapter")
    refuse_merged(adapter, folder)
    # most bases have none merged: an adapter's hash, of half a gigabyte at full size, is then not made
    merged = read_processor(folder / PROCESSOR).merged_adapter if adapter and (folder / PROCESSOR).exists() else ""
    if adapter and merged and merged == adapter_fingerprint(adapter):
        raise ConfigError(f"{folder} has {adapter} merged in already: give {folder} alone")
    config = model_config(folder, adapter, new_heads=new_heads, **choice)
    stored = weights.stored_tensors(folder)
    with torch.device("meta"):
        vla = VLA(config)
    ours = adapter is not None and (adapter / PROCESSOR).exists()
    # an adapter of ours brings the heads that it was trained with
    heads = _heads(vla, adapter if ours and adapter else folder, new=new_heads and not ours)
    if saved := quantization.saved_as(folder / CONFIG):
        if adapter is not None:
            quantization.refuse(folder / CONFIG, "an adapter is merged before")
        quantization.quantize(vla, saved.precision, vision=saved.vision, dtype=dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in vla.state_dict().items()}
    weights.check_names(shapes, stored | heads, folder)
    remembered = read_processor(adapter / PROCESSOR) if ours and adapter else None
    if remembered and remembered.base_fingerprint and remembered.base_fingerprint != weights.fingerprint(stored):
        raise ConfigError(
            f"{adapter} was trained on other weights ({remembered.base_model}) than {folder}: give that base"
        )
    if shard is not None:
        shard(vla)
    if nf4:
        prepare_nf4(vla, on_cpu=torch.device(device).type == "cpu")
    weights.fill(vla, stored, dtype=dtype, device=device)
    weights.fill(vla, heads, dtype=adapter_dtype or dtype, device=device)
    if saved:
        return vla.requires_grad_(False)
    if adapter is not None:
        load_adapter(vla, adapter, dtype=adapter_dtype or dtype)
    return vla


def _heads(vla: VLA, folder: Path, *, new: bool) -> dict[str, weights.StoredTensor]:
    """The tensors of vla's heads in a folder; new: a head without a file is initialised as torch does it, as the original's are."""
    heads = stored_heads(folder)
    if new and vla.proprio_projector is None:  # what learnt with a state goes on without it
        heads = {name: tensor for name, tensor in heads.items() if not name.startswith("proprio_projector")}
    for part in HEADS:
        module = getattr(vla, part)
        if module is None or any(name.startswith(part) for name in heads):
            continue
        if not new:
            raise ConfigError(f"{folder} has no {part}: copy its file from where the folder came from")
        fresh = copy.deepcopy(module).to_empty(device="cpu")
        for layer in fresh.modules():
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                layer.reset_parameters()
        for name, tensor in fresh.state_dict(prefix=f"{part}.").items():
            heads[name] = weights.StoredTensor(folder, tuple(tensor.shape), lambda tensor=tensor: tensor)
    return heads


def _size(stored: Mapping[str, weights.StoredTensor], dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's tensors in dtype."""
    return dtype.itemsize * sum(math.prod(tensor.shape) for tensor in stored.values())


def _free_on_gpu(device: str) -> int:
    """Bytes; what torch holds of its memory and nobody uses is free, too."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def load_merged(folder: Path, adapter: Path | None, *, dtype: torch.dtype, device: str = "cpu", **choice: Any) -> VLA:
    """As load_vla, with the adapter merged in float32, for acting and for export.py: a folder and its export answer alike.

    ConfigError where the memory that is to hold it can't: this machine's would end the process without a word.
    """
    if not quantization.saved_as(folder / CONFIG):
        on_gpu = torch.device(device).type == "cuda"
        size = _size(weights.stored_tensors(folder), dtype)
        free = _free_on_gpu(device) if on_gpu else available_memory()
        if size > free:
            way = "a larger machine or a GPU that holds it, or a folder that export.py --quantize made on one"
            place, way = ("the GPU's memory", "--quantize int8 or int4") if on_gpu else ("memory", way)
            said = f"{folder} takes {size / 1e9:.1f} GB of {place} in {str(dtype).removeprefix('torch.')}"
            raise ConfigError(f"{said} and {free / 1e9:.1f} GB are free: end other processes, or take {way}")
    vla = load_vla(folder, adapter, dtype=dtype, device=device, adapter_dtype=torch.float32, **choice)
    if adapter is not None:
        merge_lora(vla)
    for part in HEADS:
        if getattr(vla, part) is not None:
            getattr(vla, part).to(dtype)
    return vla


def base_and_adapter(checkpoint: str | Path, adapter: str | Path | None = None) -> tuple[Path, Path | None]:
    """Folders of the base and of the adapter, which may be given as the checkpoint alone. ConfigError for two adapters, or for one that is none."""
    folder = resolve(checkpoint)
    refuse_merged(folder)
    if (folder / ADAPTER_CONFIG).exists():
        if adapter is not None:
            raise ConfigError(
                f"{folder} is itself an adapter: give its base as the checkpoint, or leave the second adapter out"
            )
        folder, adapter = resolve(adapter_base(folder)), folder
    adapter = None if adapter is None else resolve(adapter)
    if adapter is not None and not (adapter / ADAPTER_CONFIG).exists():
        raise ConfigError(
            f"{adapter} has no {ADAPTER_CONFIG}: give the adapter's folder that finetune.py or peft wrote"
        )
    return folder, adapter


def load_policy(
    checkpoint: str | Path,
    adapter: str | Path | None = None,
    unnorm_key: str | None = None,
    center_crop: bool | None = None,
    quantize: str = "none",
    device: str | None = None,
    backend: str | None = None,
    drafting: bool | None = None,
    **choice: Any,
) -> VLAPolicy:
    """A policy from a checkpoint folder, a hub id or an adapter folder (which knows its base). bfloat16 on a GPU, float32 on a CPU.

    quantize: none (a folder that export.py quantised stays so), int8 or int4; backend: torch (weight only) or bitsandbytes, None: torch.
    drafting: whether a named episode's last answer is the draft of its next (same tokens, fewer forward passes); None: yes, except with bitsandbytes.
    choice: as load_vla's; ConfigError where it contradicts the folder.
    """
    folder, adapter_folder = base_and_adapter(checkpoint, adapter)
    choice = {name: value for name, value in choice.items() if value is not None}
    device = device or ("cuda" if uses_gpu() else "cpu")
    processor = load_processor(folder, adapter_folder, unnorm_key=unnorm_key, center_crop=center_crop, **choice)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    precision, backend = quantization.choose(folder / CONFIG, quantize, backend)
    stored = weights.stored_tensors(folder)
    rounding = None if quantization.saved_as(folder / CONFIG) else backend
    own = weights.stored_dtype(stored) if rounding else dtype  # rounded from the checkpoint's own numbers
    place = device
    if rounding and device.startswith("cuda"):  # layer by layer, from this machine's memory where the whole has no room
        room = _free_on_gpu(device) > _size(stored, own) + ROUNDING_BYTES
        place = device if room else "cpu"
    vla = load_merged(folder, adapter_folder, dtype=own, device=place, **choice)
    if rounding:
        quantization.quantize(vla, precision, rounding, dtype=dtype, device=device)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # what merging and rounding took: simulators draw in the same memory
    if vla.config.action_head != "tokens" and vla.config.action_dim != processor.action_dim:
        raise ConfigError(
            f"{checkpoint} answers with {vla.config.action_dim} numbers, but the statistics of {processor.config.unnorm_key} are of actions of "
            f"{processor.action_dim}: give those of the data that it learnt from"
        )
    chunked = vla.config.action_head != "tokens"
    bits = backend == "bitsandbytes"  # rounds a whole pass at a time, so its tokens would follow the draft
    if drafting and bits and not chunked:
        raise ConfigError(
            "bitsandbytes rounds a whole pass at a time, so a draft could change its tokens: leave out --drafting True"
        )
    drafting = not chunked and (not bits if drafting is None else drafting)
    guessed = chunked and processor_home(folder, adapter_folder) is None
    facts = {
        "checkpoint": str(checkpoint),
        "checkpoint_fingerprint": weights.fingerprint(stored | stored_heads(folder)),
        "adapter": None if adapter_folder is None else str(adapter_folder),
        "adapter_fingerprint": None if adapter_folder is None else adapter_fingerprint(adapter_folder),
        "quantize": precision,
        "quantize_backend": backend and f"{backend} {importlib.metadata.version(backend)}",
        # by the published recipe
        "assumed": {name: getattr(vla.config, name) for name in UNSAID if guessed and name not in choice},
        **describe(vla, processor, drafting=drafting),
    }
    return VLAPolicy(vla, processor, facts, decoder=decoder_for(vla, compilable=not bits), drafting=drafting)


def adapter_fingerprint(folder: Path) -> str:
    """Hash of an adapter's tensors and heads, whatever else lies in its folder."""
    return weights.fingerprint(weights.adapter_tensors(folder) | stored_heads(folder))


def is_its_own(path: Path) -> bool:
    """Whether a file is its folder's own: no link to anywhere but the hub's cache, whose snapshots link to its blobs."""
    place, target = path.parent.resolve(), path.resolve()
    return target.is_file() and target.parent in (place, place.parent.parent / "blobs")


def adapter_base(folder: Path) -> str:
    """The base model's folder or id that an adapter names; a relative folder is looked for beside the adapter, then from here."""
    name = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        said = f"{folder / ADAPTER_CONFIG}: base_model_name_or_path names no base model"
        raise ConfigError(f"{said}: give the base and --lora_checkpoint {folder}")
    name = expanded(name, f"{folder / ADAPTER_CONFIG}: base_model_name_or_path")
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ConfigError(
            f"{folder} was trained on {name}, which is not there any more: give the base and --lora_checkpoint {folder}"
        )
    beside = folder.parent / name
    return str(beside) if beside.is_dir() else name


def save_checkpoint(
    folder: Path,
    vla: VLA,
    *,
    processor: Processor,
    statistics: Mapping[str, Any],
    tokenizer_from: Path,
    dtype: torch.dtype,
    tensors: Mapping[str, torch.Tensor] | None = None,
    precision: str = "none",
    published: bool = False,
) -> None:
    """Write a checkpoint folder in OpenVLA's form from a model without adapters. The folder appears whole or not at all.

    tensors: what to write in place of vla's own, which may be sharded over processes.
    precision int8 or int4 quantises it on the way (for load_vla only; the original code can't read it), in place.
    published: heads as the files that OpenVLA-OFT's code looks for.
    """
    config = config_json(vla.config) | {"norm_stats": statistics, "torch_dtype": str(dtype).removeprefix("torch.")}
    if precision == "none":
        tensors = vla.state_dict() if tensors is None else tensors
        tensors = {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
    else:
        tensors = quantization.quantize(vla, precision, dtype=dtype).state_dict()
        # quantize() has refused any other precision
        saved = quantization.Saved(precision, vision=False, format=1)  # pyright: ignore[reportArgumentType]
        config["quantization"] = dataclasses.asdict(saved)
    with whole_folder(folder) as partial:
        weights.save_weights({name: kept for name, kept in tensors.items() if not name.startswith(HEADS)}, partial)
        save_heads(partial, tensors, published=published)
        (partial / CONFIG).write_text(json.dumps(config, indent=2))
        (partial / STATISTICS).write_text(json.dumps(statistics, indent=2))
        (partial / PROCESSOR).write_text(processor.config.to_json())
        (partial / PREPROCESSOR).write_text(json.dumps(preprocessor_json(processor.config), indent=2))
        for name in TOKENIZER_FILES:
            # the first was read as this model's, wherever it lies
            if name == TOKENIZER or is_its_own(tokenizer_from / name):
                (partial / name).write_bytes(read_bytes(tokenizer_from / name))
            elif (tokenizer_from / name).exists():
                print(
                    f"notice: {tokenizer_from / name} is a link to somewhere else, so it is left out", file=sys.stderr
                )
