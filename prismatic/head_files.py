"""The heads of a folder: the files they lie in, and which head, chunk, images and state a folder means.

OpenVLA-OFT's folders have `action_head--N_checkpoint.pt` and `proprio_projector--N_checkpoint.pt`, ours `action_head.safetensors` and
`proprio_projector.safetensors`. Surprising: a published folder says neither how many images it reads nor how many actions it answers with,
and one without a head may decode its tokens at once or one by one: what can't be read off the files is asked for, never guessed.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prismatic.dataset_statistics import load_statistics, read_statistics
from prismatic.errors import ConfigError
from prismatic.filenames import ACTION_HEAD, CONFIG, MERGED_ADAPTER, PROCESSOR, PROPRIO_PROJECTOR, STATISTICS
from prismatic.models.config_file import read_config
from prismatic.models.heads import HEADS
from prismatic.models.vla import VLAConfig
from prismatic.models.weights import (
    StoredTensor,
    adapter_tensors,
    fingerprint,
    read_pickle,
    read_safetensors,
    save_tensors,
)
from prismatic.processor import ProcessorConfig
from prismatic.processor_json import processor_home, read_processor
from prismatic.records import read_object

OWN = dict(zip(HEADS, (ACTION_HEAD, PROPRIO_PROJECTOR), strict=True))
PUBLISHED = "{part}--{step}_checkpoint.pt"
PUBLISHED_CHUNK, PUBLISHED_IMAGES = 8, 2  # of OpenVLA-OFT's LIBERO recipe; one image where there is no state either
# by widths of action and state
OTHER_RECIPES = {(7, 7): "Bridge (5 actions)", (14, 14): "ALOHA (25 actions, scaled by minimum and maximum)"}
NOT_BUILT = {"vision_backbone": "FiLM towers", "noisy_action_projector": "a diffusion head"}
CHOICE = ("action_head", "num_actions_chunk", "num_images_in_input", "proprio_dim", "stop_token")


def stored_heads(folder: Path) -> dict[str, StoredTensor]:
    """Tensors of the heads in a folder, under the VLA's names; {} where there are none. ConfigError for two of a kind or of different steps."""
    for part, what in NOT_BUILT.items():
        if found := next(folder.glob(PUBLISHED.format(part=part, step="*")), None):
            raise ConfigError(f"{found} is of {what}, which are not built here: take a checkpoint without it")
    tensors: dict[str, StoredTensor] = {}
    steps: dict[str, str] = {}
    for part, own in OWN.items():
        files = sorted([*folder.glob(own), *folder.glob(PUBLISHED.format(part=part, step="*"))])
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ConfigError(f"{folder} holds more than one {part} ({names}): keep that of the weights' training step")
        for file in files:
            read = dict(read_safetensors(file)) if file.name == own else read_pickle(file, "head")
            # names may begin with the `module.` of DDP
            tensors |= {f"{part}.{name.removeprefix('module.')}": tensor for name, tensor in read.items()}
            steps[file.name] = re.sub(r".*--|_checkpoint\.pt|.*\.safetensors", "", file.name)
    if len(set(steps.values())) > 1:
        raise ConfigError(f"{folder}: {' and '.join(steps)} are of different training steps: copy both of one step")
    return tensors


def save_heads(folder: Path, tensors: Mapping[str, torch.Tensor], *, published: bool = False) -> None:
    """Write the heads among tensors (named as a VLA's) into a folder: safetensors, or published, as OpenVLA-OFT's code looks for them."""
    for part, own in OWN.items():
        of_part = {
            name.removeprefix(f"{part}."): tensor.detach().contiguous().cpu()
            for name, tensor in tensors.items()
            if name.startswith(f"{part}.")
        }
        if of_part and published:
            torch.save(of_part, folder / PUBLISHED.format(part=part, step="latest"))
        elif of_part:
            save_tensors(of_part, folder / own)


def refuse_merged(adapter: Path | None, base: Path | None = None) -> None:
    """ConfigError for the adapter that lies in a published folder, whose weights hold it already, and for a copy of it on that base."""
    if adapter is None:
        return
    lies_in = adapter.name == MERGED_ADAPTER and (adapter.parent / CONFIG).exists()
    base = adapter.parent if lies_in else base
    merged = None if base is None else base / MERGED_ADAPTER
    if lies_in or (
        merged and merged.is_dir() and fingerprint(adapter_tensors(adapter)) == fingerprint(adapter_tensors(merged))
    ):
        raise ConfigError(f"{adapter} is merged into {base} already: give that folder as the checkpoint alone")


def model_config(folder: Path, adapter: Path | None = None, *, new_heads: bool = False, **given: Any) -> VLAConfig:
    """The config of a checkpoint folder with the choices of its processor.json (or the adapter's), else of its files and of what is given.

    given: action_head, num_actions_chunk, num_images_in_input, proprio_dim, stop_token; None says nothing. new_heads: they count more than the
    folder, which may lack those heads, for training. ConfigError for a contradiction, and where a folder could be of more than one kind.
    """
    config = read_config(folder / CONFIG)
    given = {name: value for name, value in given.items() if value is not None}
    home = processor_home(folder, adapter)
    if unknown := sorted(given.keys() - {*CHOICE, "action_dim"}):
        raise TypeError(f"unknown argument {unknown[0]!r}: a model's choices are {', '.join(CHOICE)}")
    heads = stored_heads(home or folder)
    if adapter is not None and home != adapter:
        _refuse_apart(adapter)
    if home is None:
        said = _read_off(folder, config, heads, given, new_heads=new_heads)
    else:
        processor = read_processor(home / PROCESSOR)
        said = {name: getattr(processor, name) for name in CHOICE}
        said["action_dim"] = _action_dim(heads, config)
        if processor.action_head == "parallel":  # has no file that shows it, and an adapter's base may have another
            said["action_dim"] = _width_of_data(home, processor) or config.action_dim
        for name in CHOICE if home == folder else ():
            if said[name] != (there := getattr(config, name)):
                where = f"{folder / PROCESSOR}: {name} is {said[name]}, but {CONFIG} beside it says {there}"
                raise ConfigError(f"{where}: copy both again from where the folder came from")
    if new_heads:
        said |= given
    for name, value in given.items():
        if said[name] != value:
            where = folder if home is None else home / PROCESSOR
            raise ConfigError(f"--{name} {value} contradicts {where}, which says {said[name]}: leave it out")
    if said["action_head"] != "l1" and any(name.startswith("action_head") for name in heads):
        kind = said["action_head"]
        way_out = f"{PROCESSOR} says {kind}, copy it again"
        if "action_head" in given:
            way_out = f"leave out --action_head {kind}"
        raise ConfigError(f"{home or folder} holds an action head, so its token head is untrained: {way_out}")
    return dataclasses.replace(config, **said)


def _read_off(
    folder: Path, config: VLAConfig, heads: Mapping[str, StoredTensor], given: Mapping[str, Any], *, new_heads: bool
) -> dict[str, Any]:
    """The choices of a folder without a processor.json."""
    parts = {name.split(".")[0] for name in heads}
    kind = given.get("action_head") or _kind(folder, config, parts)
    if "action_head" not in parts and kind == "l1" and not new_heads:
        raise ConfigError(f"{folder} has no action_head--N_checkpoint.pt: copy it from where the folder came from")
    state = heads.get("proprio_projector.fc1.weight")
    chunked = kind != "tokens"
    found = {
        "num_actions_chunk": PUBLISHED_CHUNK if chunked else 1,
        "num_images_in_input": PUBLISHED_IMAGES if state else config.num_images_in_input,
        "proprio_dim": state.shape[1] if state else 0,
        "stop_token": config.stop_token,
    }
    width = _action_dim(heads, config)
    recipe = OTHER_RECIPES.get((width, found["proprio_dim"]))
    if kind == config.action_head and chunked:  # one of ours that lost its processor.json
        found = {name: getattr(config, name) for name in found}
    elif recipe and kind == "l1" and "num_actions_chunk" not in given:
        said = f"{folder} has the sizes of OpenVLA-OFT's {recipe} recipe"
        raise ConfigError(f"{said}, whose chunks are not LIBERO's and stand in no file: give --num_actions_chunk")
    return {"action_head": kind, "action_dim": width, **found, **given}


def _refuse_apart(adapter: Path) -> None:
    """ConfigError for a foreign adapter whose heads or statistics lie beside it, as OpenVLA-OFT leaves them: the base has others, or none."""
    places, beside = [adapter], []
    if adapter.name == MERGED_ADAPTER and not (adapter.parent / CONFIG).exists():  # else merged, see refuse_merged
        places.append(adapter.parent)
        beside += adapter.parent.glob(STATISTICS)
    for place, part in itertools.product(places, OWN):
        beside += [*place.glob(PUBLISHED.format(part=part, step="*")), *place.glob(OWN[part])]
    if beside:
        said = f"{adapter} learnt with {beside[0]}, which a base lacks: merge it by the original's merge_lora_weights_and_save.py"
        raise ConfigError(f"{said} and give that folder alone, or copy its {PROCESSOR} too where it was trained here")


def _kind(folder: Path, config: VLAConfig, parts: set[str]) -> str:
    if "action_head" in parts:
        return "l1"
    if config.action_head != "tokens" or "action_head" in read_object(folder / CONFIG):
        return config.action_head
    signs = ["a proprio projector"] * ("proprio_projector" in parts)
    signs += [MERGED_ADAPTER] * (folder / MERGED_ADAPTER).is_dir()
    if signs or _learnt_with_state(folder):
        sign = (*signs, "statistics of the robot's state")[0]
        raise ConfigError(
            f"{folder} has {sign}, as OpenVLA-OFT's folders have, but no action head: give --action_head parallel (all tokens at once, as "
            "RL checkpoints), --action_head tokens (one by one), or copy its action_head--N_checkpoint.pt"
        )
    return "tokens"


def _learnt_with_state(folder: Path) -> bool:
    """Whether statistics hold states that change: OpenVLA's own always have zeros there."""
    states = [entry.get("proprio") for entry in load_statistics(folder, needed=False).values()]
    columns = [state.get("q99") for state in states if isinstance(state, dict)]
    return any(isinstance(column, list) and any(column) for column in columns)


def _action_dim(heads: Mapping[str, StoredTensor], config: VLAConfig) -> int:
    last = heads.get("action_head.model.fc2.bias")
    return config.action_dim if last is None else last.shape[0]


def _width_of_data(home: Path, processor: ProcessorConfig) -> int | None:
    """Numbers of an action in a folder's statistics; None where they don't say."""
    entries = read_statistics(home / STATISTICS) if (home / STATISTICS).exists() else {}
    chosen = [entries[processor.unnorm_key]] if processor.unnorm_key in entries else [*entries.values()]
    columns = [found.get("q01") for entry in chosen if isinstance(found := entry.get("action"), dict)]
    widths = {len(column) for column in columns if isinstance(column, list)}
    return widths.pop() if len(widths) == 1 else None
