"""Small OpenVLA-OFT folders for tests, of random weights: our own form and the published one."""

import dataclasses
import json
from pathlib import Path

import torch

from prismatic.checkpoint import save_checkpoint
from prismatic.models.config_file import config_json
from prismatic.models.heads import HEADS
from prismatic.models.tiny import TINY, tiny_tokenizer
from prismatic.models.vla import VLA
from prismatic.processor import Processor, ProcessorConfig

CONFIG = dataclasses.replace(TINY, action_head="l1", num_actions_chunk=4, proprio_dim=5)
COLUMNS = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "min": [-1.0] * 7, "max": [1.0] * 7, "mask": [True] * 6 + [False]}
STATE = {"q01": [-2.0] * 5, "q99": [2.0] * 5, "min": [-2.0] * 5, "max": [2.0] * 5}
STATISTICS = {"demo": {"action": COLUMNS, "proprio": STATE}}


def saved(folder: Path, vla: VLA, *, foreign: bool = False) -> Path:
    """A checkpoint folder; foreign: as the original saves it, which says nothing about heads, images and state."""
    config = ProcessorConfig.for_model(vla.config, unnorm_key="demo", center_crop=True)
    words = tiny_tokenizer(["pick up the black bowl"])
    words.save_pretrained(folder.parent / "words")
    processor = Processor(config, words, STATISTICS)
    save_checkpoint(
        folder,
        vla,
        processor=processor,
        statistics=STATISTICS,
        tokenizer_from=folder.parent / "words",
        dtype=torch.float32,
        published=foreign,
    )
    if foreign:
        plain = config_json(dataclasses.replace(vla.config, action_head="tokens", num_actions_chunk=1, proprio_dim=0))
        del plain["action_head"]
        (folder / "config.json").write_text(json.dumps(plain | {"norm_stats": STATISTICS}))
        (folder / "processor.json").unlink()
        for part in HEADS:
            if (folder / f"{part}--latest_checkpoint.pt").exists():
                (folder / f"{part}--latest_checkpoint.pt").rename(folder / f"{part}--100_checkpoint.pt")
    return folder
