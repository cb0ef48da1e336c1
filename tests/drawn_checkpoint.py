"""Small checkpoint folders of random weights, OpenVLA's kind and OpenVLA-OFT's: in our own form and in the published one."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from prismatic.checkpoint import save_checkpoint
from prismatic.models.config_file import config_json
from prismatic.models.heads import HEADS
from prismatic.models.tiny import TINY, tiny_tokenizer
from prismatic.models.vla import VLA, VLAConfig
from prismatic.processor import Processor, ProcessorConfig

TINY_OFT = dataclasses.replace(TINY, action_head="l1", num_actions_chunk=4, proprio_dim=5)
COLUMNS = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "min": [-1.0] * 7, "max": [1.0] * 7, "mask": [True] * 6 + [False]}
STATE = {"q01": [-2.0] * 5, "q99": [2.0] * 5, "min": [-2.0] * 5, "max": [2.0] * 5}
ENTRY = {"action": COLUMNS, "proprio": STATE}


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(["pick up the black bowl and put it on the plate"])


def drawn_processor(
    config: VLAConfig = TINY, key: str = "demo", statistics: Mapping[str, Any] | None = None, **how: Any
) -> Processor:
    """how: base_model and base_fingerprint, of an adapter's."""
    chosen = ProcessorConfig.for_model(config, unnorm_key=key, center_crop=True, **how)
    return Processor(chosen, tokenizer(), statistics or {key: ENTRY})


def saved(folder: Path, vla: VLA, *, key: str = "demo", foreign: bool = False) -> Path:
    """A checkpoint folder; foreign: as OpenVLA-OFT saves it, which says nothing about heads, images and state."""
    tokenizer().save_pretrained(folder.parent / "words")
    processor = drawn_processor(vla.config, key)
    how: dict[str, Any] = {"tokenizer_from": folder.parent / "words", "dtype": torch.float32, "published": foreign}
    save_checkpoint(folder, vla, processor=processor, statistics=processor.statistics, **how)
    if foreign:
        plain = config_json(dataclasses.replace(vla.config, action_head="tokens", num_actions_chunk=1, proprio_dim=0))
        del plain["action_head"]
        (folder / "config.json").write_text(json.dumps(plain | {"norm_stats": processor.statistics}))
        (folder / "processor.json").unlink()
        for part in HEADS:
            if (folder / f"{part}--latest_checkpoint.pt").exists():
                (folder / f"{part}--latest_checkpoint.pt").rename(folder / f"{part}--100_checkpoint.pt")
    return folder
