"""How much host memory does loading a checkpoint take? In: a folder, or none: then a full-size one with random weights is made first.

Out: a table. What counts is RssAnon, memory that can't be dropped again; pages of the mapped file (RssFile) can.
"""

import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from prismatic.checkpoint import load_vla
from prismatic.filenames import CONFIG, WEIGHTS_INDEX
from prismatic.machine import resident
from prismatic.models.config_file import config_json
from prismatic.models.vla import VLA, VLAConfig
from prismatic.models.weights import stored_tensors

SAMPLE_SECONDS = 0.02
SHARD_BYTES = 2 * 10**9  # made one after another, so that making the folder needs little memory


def random_folder(folder: Path, config: VLAConfig, *, seed: int = 0) -> Path:
    """A checkpoint folder of config's size with random bfloat16 weights, in shards with an index; kept if it is whole already."""
    if (folder / WEIGHTS_INDEX).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VLA(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    names: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    files = 0
    for place, (name, shape) in enumerate(shapes.items(), start=1):
        shard[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES or place == len(shapes):
            files += 1
            save_file(shard, folder / f"model-{files:05d}.safetensors", metadata={"format": "pt"})
            names |= dict.fromkeys(shard, f"model-{files:05d}.safetensors")
            shard = {}
    (folder / CONFIG).write_text(json.dumps(config_json(config)))
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


class Peak:
    """`with Peak() as peak: …` then `peak.bytes`: the largest RssAnon seen meanwhile, above what was there before."""

    def __enter__(self) -> "Peak":
        self.before = self.largest = resident("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.largest = max(self.largest, resident("RssAnon"))

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.largest = max(self.largest, resident("RssAnon"))

    @property
    def bytes(self) -> int:
        return self.largest - self.before


def run(folder: Path | None, workspace: Path) -> list[dict[str, Any]]:
    """One row: bytes on disk, peak RssAnon, their ratio, seconds."""
    folder = folder or random_folder(workspace / "openvla-7b-random", VLAConfig())
    size = sum(tensor.read().nbytes for tensor in stored_tensors(folder).values())
    start = time.monotonic()
    with Peak() as peak:
        vla = load_vla(folder, dtype=torch.bfloat16)
    return [
        {
            "what": f"load {sum(p.numel() for p in vla.parameters()):,} parameters",
            "weights GB": round(size / 1e9, 2),
            "peak RssAnon GB": round(peak.bytes / 1e9, 2),
            "ratio": round(peak.bytes / size, 3),
            "seconds": round(time.monotonic() - start, 1),
        }
    ]
