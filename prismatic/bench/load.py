"""How much host memory does loading a checkpoint take? In: a folder, or none: then a full-size one with random weights is made first."""

import json
import time
from pathlib import Path

import torch

from prismatic.bench.instruments import HostMemory, Row, random_model
from prismatic.checkpoint import load_vla
from prismatic.filenames import CONFIG
from prismatic.hub import resolve
from prismatic.models.config_file import config_json
from prismatic.models.vla import VLAConfig
from prismatic.models.weights import save_weights, stored_tensors


def random_folder(folder: Path, config: VLAConfig) -> Path:
    """A checkpoint folder of config's size with random bfloat16 weights; kept if it is there already."""
    if not (folder / CONFIG).exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(random_model(config, dtype=torch.bfloat16, device=torch.device("cpu")).state_dict(), folder)
        (folder / CONFIG).write_text(json.dumps(config_json(config)))  # last: it says that the folder is whole
    return folder


def run(checkpoint: str | None, random: Path) -> list[Row]:
    """One row: bytes on disk, peak RssAnon, their ratio, seconds. random: where the folder of random weights is, or will be."""
    folder = resolve(checkpoint) if checkpoint else random_folder(random, VLAConfig())
    size = sum(tensor.read().nbytes for tensor in stored_tensors(folder).values())
    start = time.monotonic()
    with HostMemory() as memory:
        vla = load_vla(folder, dtype=torch.bfloat16)
    return [
        {
            "what": f"load {sum(p.numel() for p in vla.parameters()):,} parameters",
            "weights GB": round(size / 1e9, 2),
            "peak RssAnon GB": round(memory.bytes / 1e9, 2),
            "ratio": round(memory.bytes / size, 3),
            "seconds": round(time.monotonic() - start, 1),
        }
    ]
