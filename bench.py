"""Measure: `python bench.py load | train | memory | data | eval | precision | infer | serve | gpu`. One table, and the same as JSON with --json FILE.

python bench.py load                              a full-size folder with random weights (15 GB of disk, 16 GB of memory)
python bench.py load --checkpoint FOLDER          a folder of yours
python bench.py train                             training steps, ours against the plain way: full size on a GPU, small on a CPU
python bench.py memory                            what fits on which card, planned
python bench.py data                              an RLDS set as large as LIBERO-Spatial: its cache, the loader, host memory
python bench.py eval --workers 2 4                episodes an hour: simulators side by side against one alone
python bench.py precision --checkpoint FOLDER --data_root_dir DATA --dataset_name NAME      what quantising changes
python bench.py gpu --out FOLDER                 everything that a rented GPU can tell, in ten minutes (its own --help)
python bench.py infer --plot latency.png          time and memory of an action: full size and random on a GPU, the small model on a CPU
python bench.py serve                             serve.py under load: latency, throughput, memory, and hostile requests
"""

import os
import sys

if __name__ == "__main__" and sys.argv[1:2] == ["gpu"]:  # before the imports that a rented machine may lack
    from prismatic.bench import gpu

    sys.exit(gpu.main(sys.argv[2:]))

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from config import WORKSPACE
from prismatic.atomic import write_json
from prismatic.errors import ConfigError, exit_codes
from prismatic.hub import resolve
from prismatic.ranges import Count, Positive, checked

Rows = list[dict[str, Any]]
MAY_BE_ZERO = ("task_id", "num_workers")  # of the numbers below
PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    # Also write the table here.
    json: Path | None = None


@dataclass(frozen=True)
class BenchLoadConfig(BenchConfig):
    # Checkpoint folder or hub id; none makes one of full size with random weights below WORKSPACE.
    checkpoint: str | None = None


def load(cfg: BenchLoadConfig) -> Rows:
    """Host memory while a checkpoint loads."""
    from prismatic.bench import load

    return load.run(resolve(cfg.checkpoint) if cfg.checkpoint else None, WORKSPACE)


@dataclass(frozen=True)
class BenchEvalConfig(BenchConfig):
    # Checkpoint folder, adapter folder or hub id that acts, and the suite and task that it acts in.
    checkpoint: str = "checkpoints/openvla-tiny"
    task_suite_name: str = "libero_spatial"
    task_id: Count = 0
    # Episodes of each row (at least one a process), and steps after which one is cut off.
    episodes: Positive = 4
    steps: Positive = 60
    # fast: seven times faster on a CPU. standard: LIBERO's own pixels.
    render_quality: Literal["standard", "fast"] = "standard"
    # Numbers of simulator processes, each against one process alone.
    workers: tuple[Positive, ...] = (2,)


def evaluation(cfg: BenchEvalConfig) -> Rows:
    """Episodes an hour: one simulator alone against several side by side."""
    from prismatic.bench import eval

    return eval.run(
        cfg.checkpoint,
        suite=cfg.task_suite_name,
        task_id=cfg.task_id,
        workers=cfg.workers,
        episodes=cfg.episodes,
        steps=cfg.steps,
        quality=cfg.render_quality,
    )


@dataclass(frozen=True)
class BenchTrainConfig(BenchConfig):
    # openvla-7b's size, or a small model's. None: full where there is a GPU.
    full_size: bool | None = None
    # GPU memory that tensors may take. Of a 24 GB card ECC and the driver leave about this much.
    memory_cap_gib: float = 22.0
    # Micro-batches to try, rising; a way that doesn't fit is not tried at larger ones. None: 1 to 32 on a GPU, 1 and 4 on a CPU.
    batch_sizes: tuple[Positive, ...] | None = None
    # Timed steps of each.
    steps: Positive = 5
    # torch.compile our blocks.
    compile: bool = False


def train(cfg: BenchTrainConfig) -> Rows:
    """Samples a second and memory of training steps, ours against the plain way."""
    from prismatic.bench import train

    return train.run(
        full_size=cfg.full_size,
        memory_cap_gib=cfg.memory_cap_gib,
        batch_sizes=cfg.batch_sizes,
        steps=cfg.steps,
        compiled=cfg.compile,
    )


@dataclass(frozen=True)
class BenchMemoryConfig(BenchConfig):
    # Sizes of cards in GiB.
    cards: tuple[float, ...] = (12, 16, 24, 48, 80)


def memory(cfg: BenchMemoryConfig) -> Rows:
    """What fits on which card, by finetune.py's plans."""
    from prismatic.bench import memory

    return memory.run(cfg.cards)


@dataclass(frozen=True)
class BenchDataConfig(BenchConfig):
    # Episodes of the set that is made: libero_spatial_no_noops has 432 …
    episodes: Positive = 432
    # … and 52,970 frames.
    frames: Positive = 52_970
    # Frames of the last row, which shows the memory while they are loaded. None: an epoch.
    loaded_frames: Positive | None = None
    # Loader processes to try; 0 loads in the main process.
    num_workers: tuple[Count, ...] = (0, 1, 2, 4)
    # Folder for it, deleted afterwards.
    folder: Path = WORKSPACE / "bench-data"


def data(cfg: BenchDataConfig) -> Rows:
    """An RLDS set of LIBERO-Spatial's size: writing, reading into the cache, loading."""
    from prismatic.bench import data

    return data.run(
        cfg.folder, episodes=cfg.episodes, frames=cfg.frames, workers=cfg.num_workers, loaded=cfg.loaded_frames
    )


@dataclass(frozen=True)
class BenchPrecisionConfig(BenchConfig):
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
    # validation: its last 5 % of episodes (or its validation split). all: a data set that the checkpoint has never seen.
    held_out: Literal["validation", "all"] = "validation"
    # Frames that are asked about, evenly spread over them.
    num_frames: Positive = 1000
    # Frames of one pass.
    batch_size: Positive = 16


def precision(cfg: BenchPrecisionConfig) -> Rows:
    """Action tokens of every precision beside those of the unquantised model."""
    from prismatic.bench import precision
    from prismatic.data.mixture import open_cache

    cache = open_cache(cfg.data_root_dir, cfg.dataset_name, cache_dir=cfg.cache_dir)
    return precision.run(
        cfg.checkpoint,
        cfg.adapter,
        cache,
        num_frames=cfg.num_frames,
        every_episode=cfg.held_out == "all",
        batch_size=cfg.batch_size,
        unnorm_key=cfg.unnorm_key,
    )


@dataclass(frozen=True)
class BenchInferConfig(BenchConfig):
    # Checkpoint folder or hub id, or random: weights of openvla-7b's size (16 GB). None: random on a GPU, checkpoints/openvla-tiny on a CPU.
    checkpoint: str | None = None
    # Rows of a batch, number formats of the weights, and whether the plain way is also compiled (minutes a batch size on a CPU).
    batch_sizes: tuple[Positive, ...] = (1, 8, 32)
    quantize: tuple[Literal["none", "int8", "int4"], ...] = ("none", "int8", "int4")
    compiled: bool = True
    # Timed actions of each way. At full size on a CPU one takes about 10 s: 2 are enough.
    rounds: Positive = 30
    # Draw latency against memory into this file (png, pdf, svg).
    plot: Path | None = None


def infer(cfg: BenchInferConfig) -> Rows:
    """Ways of decoding: the plain one, the plain one at its best, ours."""
    import torch

    from prismatic.bench import infer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = cfg.checkpoint or ("checkpoints/openvla-tiny" if device == "cpu" else "random")
    rows = infer.run(
        None if checkpoint == "random" else resolve(checkpoint),
        batch_sizes=cfg.batch_sizes,
        precisions=cfg.quantize,
        device=device,
        rounds=cfg.rounds,
        compiled=cfg.compiled,
    )
    if cfg.plot:
        infer.plot(rows, cfg.plot)
    return rows


@dataclass(frozen=True)
class BenchServeConfig(BenchConfig):
    # Checkpoint folder, adapter folder or hub id that is served.
    checkpoint: str = "checkpoints/openvla-tiny"
    # Clients of mixed dialects at a time, and seconds that they ask.
    clients: Positive = 16
    seconds: float = 60.0
    # Calls whose latency is compared with and without the server, in turns.
    pairs: Positive = 100
    # Hostile requests beside a good client, and refused ones while memory is watched.
    hostile: Positive = 10_000
    requests: Positive = 10_000


def serve(cfg: BenchServeConfig) -> Rows:
    """A server under load, and under attack."""
    from prismatic.bench import serve

    return serve.run(
        cfg.checkpoint,
        clients=cfg.clients,
        seconds=cfg.seconds,
        pairs=cfg.pairs,
        hostile=cfg.hostile,
        requests=cfg.requests,
    )


BENCHES: dict[type[BenchConfig], Callable[[Any], Rows]] = {
    BenchLoadConfig: load,
    BenchTrainConfig: train,
    BenchMemoryConfig: memory,
    BenchDataConfig: data,
    BenchEvalConfig: evaluation,
    BenchPrecisionConfig: precision,
    BenchInferConfig: infer,
    BenchServeConfig: serve,
}
Config = (
    Annotated[BenchLoadConfig, tyro.conf.subcommand("load")]
    | Annotated[BenchTrainConfig, tyro.conf.subcommand("train")]
    | Annotated[BenchMemoryConfig, tyro.conf.subcommand("memory")]
    | Annotated[BenchDataConfig, tyro.conf.subcommand("data")]
    | Annotated[BenchEvalConfig, tyro.conf.subcommand("eval")]
    | Annotated[BenchPrecisionConfig, tyro.conf.subcommand("precision")]
    | Annotated[BenchInferConfig, tyro.conf.subcommand("infer")]
    | Annotated[BenchServeConfig, tyro.conf.subcommand("serve")]  # one a bench, joined by |
)


def check(cfg: BenchConfig) -> None:
    """ConfigError for what would fail only after minutes of measuring: a number that is too small, an empty list, a file that can't be written."""
    for name in [field.name for field in fields(cfg)]:
        value = getattr(cfg, name)
        if value == ():
            raise ConfigError(f"--{name} is empty: give at least one, or leave it out")
        for number in value if isinstance(value, tuple) else (value,):
            least = 0 if name in MAY_BE_ZERO else 1
            if type(number) is int and number < least:
                raise ConfigError(f"--{name} {number} is too small: give {least} or more")
            if type(number) is float and not 0 < number < float("inf"):
                raise ConfigError(f"--{name} {number:g} is no size: give a number above 0")
    for name in ("json", "plot"):
        file: Path | None = getattr(cfg, name, None)
        if file is None:
            continue
        if not os.access(file.parent, os.W_OK) or (file.exists() and not file.is_file()):
            raise ConfigError(f"--{name} {file} can't be written: give the name of a file in a folder of yours")
        if name == "plot" and file.suffix.lower() not in PICTURES:
            raise ConfigError(f"--plot {file} is no picture's name: let it end in {', '.join(PICTURES)}")


def main(cfg: BenchConfig) -> None:
    """Measure, print one table, and write it as JSON where asked."""
    cfg = checked(cfg)
    check(cfg)
    rows = BENCHES[type(cfg)](cfg)
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")
    if cfg.json:
        write_json(cfg.json, rows)


if __name__ == "__main__":
    with exit_codes():
        flags = (tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes)
        main(tyro.cli(Config, description=__doc__, config=flags, use_underscores=True))  # type: ignore[arg-type]
