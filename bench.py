"""Measure: `python bench.py train | memory | data | eval | precision | infer | serve | gpu`. One table, and the same as JSON with --json FILE.

python bench.py train                             training steps, ours against the plain way: full size on a GPU, small on a CPU
python bench.py memory                            what fits on which card, planned
python bench.py data                              an RLDS set as large as LIBERO-Spatial: its cache, the loader, host memory
python bench.py eval --workers 2 4                episodes an hour: simulators side by side against one alone
python bench.py precision --checkpoint FOLDER --data_root_dir DATA --dataset_name NAME      what quantising changes
python bench.py gpu --out FOLDER                 what a rented GPU can tell in ten minutes, the most telling first (its own --help)
python bench.py infer                             time and memory of an action: full size and random on a GPU, the small model on a CPU
python bench.py serve                             serve.py under load: latency, throughput, memory, and hostile requests
"""

import sys

if __name__ == "__main__" and sys.argv[1:2] == ["gpu"]:  # before the imports that a rented machine may lack
    from prismatic.bench import gpu

    sys.exit(gpu.main(sys.argv[2:]))

import dataclasses
import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from msgspec import Meta

from config import WORKSPACE, GripperConvention
from prismatic.atomic import write_json
from prismatic.errors import ConfigError, exit_codes
from prismatic.ranges import BelowOne, Count, Images, Positive, checked

Size = Annotated[float, Meta(gt=0, le=1e6)]
SOME = Meta(min_length=1)  # of a list: an empty one would measure nothing


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    # Also write the table here.
    json: Path | None = None


@dataclass(frozen=True)
class BenchEvalConfig(BenchConfig):
    """Episodes an hour: one simulator alone against several side by side."""

    # Checkpoint folder, adapter folder or hub id that acts.
    checkpoint: str = "checkpoints/openvla-tiny"
    # Suite and task that it acts in.
    task_suite_name: str = "libero_spatial"
    task_id: Count = 0
    # Episodes of each row (at least one a process), and steps after which one is cut off.
    episodes: Positive = 4
    steps: Positive = 60
    # fast: seven times faster on a CPU. standard: LIBERO's own pixels.
    render_quality: Literal["standard", "fast"] = "standard"
    # Numbers of simulator processes, each against one process alone.
    workers: Annotated[tuple[Positive, ...], SOME] = (2,)


@dataclass(frozen=True)
class BenchTrainConfig(BenchConfig):
    """Samples a second and memory of training steps, ours against the plain way: openvla-7b's size on a GPU, a small model's on a CPU."""

    # GPU memory that tensors may take. Of a 24 GB card ECC and the driver leave about this much.
    memory_cap_gib: Size = 22.0
    # Micro-batches to try, rising; a way that doesn't fit is not tried at larger ones. None: 1 to 32 on a GPU, 1 and 4 on a CPU.
    batch_sizes: Annotated[tuple[Positive, ...], SOME] | None = None
    # Timed steps of each.
    steps: Positive = 5


@dataclass(frozen=True)
class BenchMemoryConfig(BenchConfig):
    """What fits on which card, by finetune.py's plans."""

    # Sizes of cards in GiB.
    cards: Annotated[tuple[Size, ...], SOME] = (12, 16, 24, 48, 80)


@dataclass(frozen=True)
class BenchDataConfig(BenchConfig):
    """An RLDS set of LIBERO-Spatial's size: writing, reading into the cache, loading."""

    # Episodes of the set that is made; libero_spatial_no_noops has as many.
    episodes: Positive = 432
    # Frames of the set that is made; libero_spatial_no_noops has as many.
    frames: Positive = 52_970
    # Frames of the last row, which shows the memory while they are loaded. None: an epoch.
    loaded_frames: Positive | None = None
    # Loader processes to try; 0 loads in the main process.
    num_workers: Annotated[tuple[Count, ...], SOME] = (0, 1, 2, 4)
    # Folder for it, deleted afterwards.
    folder: Path = WORKSPACE / "bench-data"


@dataclass(frozen=True)
class BenchPrecisionConfig(BenchConfig):
    """Action tokens of every precision beside those of the unquantised model."""

    # Checkpoint folder, adapter folder (it knows its base), or hub id.
    checkpoint: str
    # Adapter folder that goes on top.
    adapter: Path | None = None
    # Key of the data set's statistics, where the checkpoint has several.
    unnorm_key: str | None = None
    # Folder of data sets; the demonstrations are data_root_dir/dataset_name.
    data_root_dir: Path = WORKSPACE / "datasets"
    # Data set in it.
    dataset_name: str = "libero_spatial_no_noops"
    # Folder of frame caches.
    cache_dir: Path = WORKSPACE / "cache"
    # Fields of that data set, where they have no usual names: image=…,wrist=…,state=…,action=…,instruction=… (see docs/data.md).
    data_keys: str = ""
    # How that data set writes its gripper. auto: found from its values.
    gripper: GripperConvention = "auto"
    # Turn each image of that data set by 180°.
    rotate_images: bool = False
    # Share of that data set's episodes that was held out when the checkpoint learnt (finetune.py's flag).
    val_share: BelowOne = 0.05
    # validation: the episodes held out. all: a data set that the checkpoint has never seen.
    held_out: Literal["validation", "all"] = "validation"
    # Frames that are asked about, evenly spread over them.
    num_frames: Positive = 1000
    # Frames of one forward pass.
    batch_size: Positive = 16


@dataclass(frozen=True)
class BenchInferConfig(BenchConfig):
    """Ways of decoding: the plain one, the plain one at its best, ours, OpenVLA-OFT's chunks."""

    # Checkpoint folder or hub id, or random: weights of openvla-7b's size (15 GB). None: random on a GPU, checkpoints/openvla-tiny on a CPU.
    checkpoint: str | None = None
    # Rows of a batch.
    batch_sizes: Annotated[tuple[Positive, ...], SOME] = (1, 8, 32)
    # Precisions of the weights.
    quantize: Annotated[tuple[Literal["none", "int8", "int4"], ...], SOME] = ("none", "int8", "int4")
    # Whether transformers' plain way is also compiled: minutes a batch size on a CPU.
    compiled: bool = True
    # Images that random weights see: 2 is OpenVLA-OFT's recipe. A checkpoint sees as many as it learnt with.
    num_images_in_input: Images = 1
    # Timed actions of each way. At full size on a CPU one takes about 10 s: 2 are enough.
    rounds: Positive = 30


@dataclass(frozen=True)
class BenchServeConfig(BenchConfig):
    """A server under load, and under attack."""

    # Checkpoint folder, adapter folder or hub id that is served.
    checkpoint: str = "checkpoints/openvla-tiny"
    # Clients of mixed dialects at a time, and seconds that they ask.
    clients: Positive = 16
    seconds: Size = 60.0
    # Calls whose latency is compared with and without the server, in turns.
    pairs: Positive = 100
    # Hostile requests beside a good client, and refused ones while memory is watched.
    hostile: Positive = 10_000
    requests: Positive = 10_000


BENCHES: dict[str, type[BenchConfig]] = {  # each is prismatic/bench/NAME.py, whose `run` takes the flags by name
    "train": BenchTrainConfig,
    "memory": BenchMemoryConfig,
    "data": BenchDataConfig,
    "eval": BenchEvalConfig,
    "precision": BenchPrecisionConfig,
    "infer": BenchInferConfig,
    "serve": BenchServeConfig,
}


def main(cfg: BenchConfig) -> None:
    """Measure, print one table, and write it as JSON where asked."""
    cfg = checked(cfg)
    if cfg.json and (not os.access(cfg.json.parent, os.W_OK) or (cfg.json.exists() and not cfg.json.is_file())):
        raise ConfigError(f"--json {cfg.json} can't be written: give the name of a file in a folder of yours")
    name = next(name for name, kind in BENCHES.items() if kind is type(cfg))
    flags = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.name != "json"}
    rows: list[dict[str, Any]] = importlib.import_module(f"prismatic.bench.{name}").run(**flags)
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in columns) + " |")
    if cfg.json:
        write_json(cfg.json, rows)


if __name__ == "__main__":
    with exit_codes():
        how = (tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes)
        kinds = Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in BENCHES.items())]  # noqa: UP007
        main(tyro.cli(kinds, description=__doc__, config=how, use_underscores=True))  # type: ignore[arg-type]
