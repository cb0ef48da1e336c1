"""Write a checkpoint, with an adapter merged into it if one is given, as an OpenVLA folder that loads by itself.

    python export.py --checkpoint openvla/openvla-7b --adapter runs/…/latest --output openvla-7b-mine

The sum of base and adapter is formed in float32. An adapter that is in the weights already is refused. `--quantize int8` writes
8-bit weights behind the merge: a folder of 28 % of the float32 size for load_policy and eval.py (the original code can't read it).
Heads of OpenVLA-OFT are written as that project's code looks for them.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from prismatic import checkpoint as files
from prismatic.dataset_statistics import load_statistics
from prismatic.errors import ConfigError, exit_codes
from prismatic.filenames import CONFIG, PROCESSOR, STATISTICS
from prismatic.models import quantize, weights
from prismatic.processor import Processor
from prismatic.processor_files import load_processor
from prismatic.processor_json import processor_home, read_processor
from prismatic.ranges import ActionHead, Few, Images, checked, command_line


@dataclass(frozen=True)
class ExportConfig:
    # Checkpoint folder, native Prismatic folder, hub id, or an adapter folder (it knows its base).
    checkpoint: str
    # Folder to write: an OpenVLA checkpoint that loads by itself, here and (but for --quantize) in the original code.
    output: Path
    # Adapter folder to merge into the checkpoint.
    adapter: Path | None = None
    # Where the statistics have several entries: which one the exported policy acts with. None: it has to be named when it acts.
    unnorm_key: str | None = None
    # For a checkpoint without processor.json: whether it was trained with random crops. None: yes.
    center_crop: bool | None = None
    # Number format of the weights. None: the checkpoint's own.
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    # int8 or int4: quantised weights, for this project alone (dtype then is that of the rest).
    quantize: Literal["none", "int8", "int4"] = "none"
    # For a folder without processor.json: tokens (one by one), parallel (a chunk of tokens at once) or l1 (regressed). None: as its files say.
    action_head: ActionHead | None = None
    # For such a folder with a head of chunks: actions that one query answers with. None: 8.
    num_actions_chunk: Few | None = None
    # For such a folder: 1, or 2 with the wrist camera. None: 2 where the model reads the robot's state.
    num_images_in_input: Images | None = None


def main(cfg: ExportConfig) -> Path:
    cfg = checked(cfg)
    cfg = dataclasses.replace(cfg, output=Path(os.path.realpath(cfg.output)))
    base, adapter = files.base_and_adapter(cfg.checkpoint, cfg.adapter)
    if cfg.output.exists() and (not cfg.output.is_dir() or any(cfg.output.iterdir())):
        raise ConfigError(f"--output {cfg.output} is not empty: give a new folder")
    quantize.refuse(base / CONFIG, "export.py starts from weights that are not")
    choice = {name: getattr(cfg, name) for name in ("action_head", "num_actions_chunk", "num_images_in_input")}
    processor = exported_processor(cfg, base, adapter, choice)
    own = weights.stored_dtype(weights.stored_tensors(base))
    dtype, is_whole = getattr(torch, cfg.dtype) if cfg.dtype else own, cfg.quantize == "none"
    # Quantised from the checkpoint's own numbers, as load_policy does.
    vla = files.load_merged(base, adapter, dtype=dtype if is_whole else own, **choice)
    parameters = sum(p.numel() for p in vla.parameters())
    how: dict[str, Any] = {"dtype": dtype, "precision": cfg.quantize, "published": is_whole, "tokenizer_from": base}
    files.save_checkpoint(cfg.output, vla, processor=processor, statistics=processor.statistics, **how)
    size = sum(file.stat().st_size for file in cfg.output.glob("*.safetensors"))
    print(
        f"{cfg.output}: {parameters:,} parameters in {dtype if is_whole else f'{cfg.quantize} and {dtype}'}, {size:,} bytes "
        f"({size / (4 * parameters):.1%} of float32), statistics of {', '.join(processor.statistics)}"
    )
    return cfg.output


def exported_processor(cfg: ExportConfig, base: Path, adapter: Path | None, choice: dict[str, Any]) -> Processor:
    """The adapter's processor where there is one; statistics of both. A foreign checkpoint with several keys leaves the choice open."""
    merged = read_processor(base / PROCESSOR).merged_adapter if (base / PROCESSOR).exists() else ""
    merged = merged if adapter is None else files.adapter_fingerprint(adapter)
    statistics = load_statistics(base, needed=False)
    if adapter is not None and (adapter / STATISTICS).exists():
        statistics |= load_statistics(adapter)
    statistics = statistics or load_statistics(base)  # which says what is missing
    home = processor_home(base, adapter)
    own = None if home is None else read_processor(home / PROCESSOR).unnorm_key
    key, is_open = cfg.unnorm_key, cfg.unnorm_key is None and own is None and len(statistics) > 1
    if is_open:  # a key is needed to build a processor at all, and is taken out again below
        key = next(iter(load_statistics(adapter if adapter and (adapter / STATISTICS).exists() else base)))
    processor = load_processor(base, adapter, unnorm_key=key, center_crop=cfg.center_crop, **choice)
    config = dataclasses.replace(
        processor.config,
        unnorm_key=None if is_open else processor.config.unnorm_key,
        base_model="",
        base_fingerprint="",
        merged_adapter=merged,
    )
    return Processor(config, processor.tokenizer, statistics)


if __name__ == "__main__":
    with exit_codes():
        main(command_line(ExportConfig, __doc__))
