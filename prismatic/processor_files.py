"""The files that a Processor comes out of: processor.json, tokenizer.json, dataset_statistics.json, preprocessor_config.json.

In: folders of a checkpoint and perhaps of an adapter. Out: a Processor. Surprising: a folder with a processor.json allows no override (but
`unnorm_key`, where it learnt from several data sets); a foreign one needs `unnorm_key` where it has several statistics, and `center_crop`
(default True).
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from transformers import PreTrainedTokenizerFast

from prismatic.dataset_statistics import COPY, check_entry, load_statistics, statistics_key
from prismatic.errors import ConfigError
from prismatic.filenames import ADAPTER_CONFIG, CONFIG, PREPROCESSOR, PROCESSOR, STATISTICS, TOKENIZER
from prismatic.head_files import model_config
from prismatic.models.vla import VLAConfig
from prismatic.processor import PROMPT, Colours, Processor, ProcessorConfig
from prismatic.processor_json import processor_home, read_processor
from prismatic.records import read_record, regular_file
from prismatic.sums import check_sum

EMPTY_TOKEN = "▁"  # Llama-2's, which stands between the prompt and the action


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder, from tokenizer.json alone: library updates can't reinterpret it."""
    path = folder / TOKENIZER
    if not path.exists():
        raise ConfigError(
            f"{path} is missing: copy it from the checkpoint, or for a native Prismatic folder from openvla-7b"
        )
    with regular_file(path):  # of a pipe the library would wait for ever
        pass
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ConfigError(
            f"{path} is damaged ({str(error).splitlines()[0]}): copy it again from the checkpoint"
        ) from None


def load_processor(
    checkpoint: Path,
    adapter: Path | None = None,
    *,
    unnorm_key: str | None = None,
    center_crop: bool | None = None,
    **choice: Any,
) -> Processor:
    """The processor of an adapter or checkpoint folder; see the module's first lines for what may be given."""
    for folder in (checkpoint, adapter):
        if folder is not None:
            for name in (CONFIG, ADAPTER_CONFIG, PROCESSOR, STATISTICS, TOKENIZER, PREPROCESSOR):
                check_sum(folder / name)
    home, model = processor_home(checkpoint, adapter), model_config(checkpoint, adapter, **choice)
    places = (adapter, home or checkpoint)
    statistics_home = next((f for f in places if f is not None and os.path.lexists(f / STATISTICS)), checkpoint)
    statistics = load_statistics(statistics_home, unnorm_key)
    if home is None or unnorm_key is not None:
        unnorm_key = statistics_key(statistics, unnorm_key, statistics_home)
    if home is None:
        crop = True if center_crop is None else center_crop
        config = ProcessorConfig.for_model(model, unnorm_key=unnorm_key, center_crop=crop, **_preprocessor(checkpoint))
    else:
        config = read_processor(home / PROCESSOR)
        if config.unnorm_key is None:
            key = unnorm_key or statistics_key(statistics, None, statistics_home)
            config = dataclasses.replace(config, unnorm_key=key)
        for flag, given in (("unnorm_key", unnorm_key), ("center_crop", center_crop)):
            if given is not None and given != (said := getattr(config, flag)):
                raise ConfigError(f"--{flag} {given} contradicts {home / PROCESSOR}, which says {said}: leave it out")
        if config.unnorm_key not in statistics:
            said = f"{statistics_home / STATISTICS} has no entry {config.unnorm_key}, which {home / PROCESSOR} names"
            raise ConfigError(f"{said}: copy both from one run")
        check_fits(config, model, home)
    entry, where = statistics[str(config.unnorm_key)], f"{statistics_home / STATISTICS}, {config.unnorm_key}"
    check_entry(entry, where, state=config.proprio_dim > 0)
    check_state(entry, config.proprio_dim, where)
    tokenizer = load_tokenizer(checkpoint)
    check_tokenizer(tokenizer, config, checkpoint / TOKENIZER)
    return Processor(config, tokenizer, statistics)


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, config: ProcessorConfig, path: Path) -> None:
    """ConfigError unless a tokenizer is the model's own: BOS first, each id within the table, the empty token where the config has it."""
    other = f"{path} is another model's tokenizer"
    ids = tokenizer(PROMPT.format(instruction="pick up the bowl")).input_ids
    if not ids or ids[0] != config.bos_token_id:
        raise ConfigError(
            f"{other}: a prompt begins with id {ids[:1]}, not with BOS, {config.bos_token_id}: copy this model's"
        )
    highest = max(tokenizer.get_vocab().values())
    if highest > max(config.vocab_size - 1, config.pad_token_id):
        raise ConfigError(
            f"{other}: its highest id is {highest}, the model has {config.vocab_size} tokens: copy this model's"
        )
    if (token := tokenizer.convert_ids_to_tokens(config.empty_token_id)) != EMPTY_TOKEN:
        raise ConfigError(
            f"{other}: id {config.empty_token_id} is {token!r}, not the empty token {EMPTY_TOKEN!r}: copy this model's"
        )


def check_fits(config: ProcessorConfig, model: VLAConfig, folder: Path) -> None:
    """ConfigError that names the first number of a folder's processor.json that its model doesn't have."""
    for field in dataclasses.fields(config):
        said = getattr(config, field.name)
        if hasattr(model, field.name) and said != (there := getattr(model, field.name)):
            raise ConfigError(
                f"{folder / PROCESSOR}: {field.name} is {said}, but {CONFIG} and the weights make it {there}: copy the folder again"
            )


def check_state(entry: Mapping[str, Any], proprio_dim: int, where: str) -> None:
    """ConfigError unless an entry's statistics of the robot's state are those that the model learnt with. OpenVLA's own are zeros."""
    if not proprio_dim:
        return
    low, high = entry["proprio"]["q01"], entry["proprio"]["q99"]
    if len(low) != proprio_dim or low == high:
        found = f"{len(low)} dimensions" + " that never change" * (low == high)
        raise ConfigError(f"{where}: proprio has {found}, but the model reads a state of {proprio_dim}: {COPY}")


class _Constants(TypedDict):
    mean: Colours
    std: Colours


class _Preprocessor(TypedDict):
    """The part of preprocessor_config.json that is read: the constants of two towers that were in force."""

    tvf_normalize_params: tuple[_Constants, _Constants]


def _preprocessor(folder: Path) -> dict[str, Any]:
    path = folder / PREPROCESSOR
    if not os.path.lexists(path):
        return {}
    towers = read_record(path, _Preprocessor)["tvf_normalize_params"]
    if not all(deviation > 0 for tower in towers for deviation in tower["std"]):
        raise ConfigError(
            f"{path}: tvf_normalize_params has a std that is not above 0: copy it again from the checkpoint"
        )
    return {"means": tuple(tower["mean"] for tower in towers), "stds": tuple(tower["std"] for tower in towers)}


def preprocessor_json(config: ProcessorConfig) -> dict[str, Any]:
    """preprocessor_config.json as OpenVLA's image processor reads it."""
    size, towers = config.image_size, len(config.means)
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "processor_class": "PrismaticProcessor",
        "image_resize_strategy": "resize-naive",
        "use_fused_vision_backbone": True,
        "input_sizes": [[3, size, size]] * towers,
        "interpolations": ["bicubic"] * towers,
        "means": config.means,
        "stds": config.stds,
        "tvf_resize_params": [{"antialias": True, "interpolation": 3, "max_size": None, "size": [size, size]}] * towers,
        "tvf_crop_params": [{"output_size": [size, size]}] * towers,
        "tvf_normalize_params": [
            {"inplace": False, "mean": mean, "std": std} for mean, std in zip(config.means, config.stds, strict=True)
        ],
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
    }
