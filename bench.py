"""Measure: `python bench.py load | train | memory | data | eval | precision | infer | draft`. One table, and the same as JSON with --json FILE.

python bench.py load                              a full-size folder with random weights (15 GB of disk, 16 GB of memory)
python bench.py load --checkpoint FOLDER          a folder of yours
python bench.py train                             training steps, ours against the plain way: full size on a GPU, small on a CPU
python bench.py memory                            what fits on which card, planned
python bench.py data                              an RLDS set as large as LIBERO-Spatial: its cache, the loader, host memory
python bench.py eval --workers 2 4                episodes an hour: simulators side by side against one alone
python bench.py precision --checkpoint FOLDER --data_root_dir DATA --dataset_name NAME      what quantising changes
python bench.py infer --plot latency.png          time and memory of an action: full size and random on a GPU, the small model on a CPU
python bench.py draft --task_id 1                 what drafting saves in episodes of the small model
"""

import json
from typing import Annotated, Any

import tyro

from config import (
    WORKSPACE,
    BenchDataConfig,
    BenchDraftConfig,
    BenchEvalConfig,
    BenchInferConfig,
    BenchLoadConfig,
    BenchMemoryConfig,
    BenchPrecisionConfig,
    BenchTrainConfig,
)
from prismatic.errors import exit_codes
from prismatic.hub import resolve

Rows = list[dict[str, Any]]


def load(cfg: BenchLoadConfig) -> Rows:
    """Host memory while a checkpoint loads."""
    from prismatic.bench import load

    return load.run(resolve(cfg.checkpoint) if cfg.checkpoint else None, WORKSPACE)


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


def memory(cfg: BenchMemoryConfig) -> Rows:
    """What fits on which card, by finetune.py's plans."""
    from prismatic.bench import memory

    return memory.run(cfg.cards)


def data(cfg: BenchDataConfig) -> Rows:
    """An RLDS set of LIBERO-Spatial's size: writing, reading into the cache, loading."""
    from prismatic.bench import data

    return data.run(cfg.folder, episodes=cfg.episodes, frames=cfg.frames, workers=cfg.num_workers)


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
        compiled=cfg.compiled,
    )
    if cfg.plot:
        infer.plot(rows, cfg.plot)
    return rows


def draft(cfg: BenchDraftConfig) -> Rows:
    """Passes and confirmed words of drafting, frame by frame of episodes in LIBERO."""
    from prismatic.bench import draft

    return draft.run(
        cfg.checkpoint,
        suite=cfg.task_suite_name,
        task_id=cfg.task_id,
        episodes=cfg.episodes,
        steps=cfg.steps,
        quality=cfg.render_quality,
    )


BENCHES = {
    BenchLoadConfig: load,
    BenchTrainConfig: train,
    BenchMemoryConfig: memory,
    BenchDataConfig: data,
    BenchEvalConfig: evaluation,
    BenchPrecisionConfig: precision,
    BenchInferConfig: infer,
    BenchDraftConfig: draft,
}
Config = (
    Annotated[BenchLoadConfig, tyro.conf.subcommand("load")]
    | Annotated[BenchTrainConfig, tyro.conf.subcommand("train")]
    | Annotated[BenchMemoryConfig, tyro.conf.subcommand("memory")]
    | Annotated[BenchDataConfig, tyro.conf.subcommand("data")]
    | Annotated[BenchEvalConfig, tyro.conf.subcommand("eval")]
    | Annotated[BenchPrecisionConfig, tyro.conf.subcommand("precision")]
    | Annotated[BenchInferConfig, tyro.conf.subcommand("infer")]
    | Annotated[BenchDraftConfig, tyro.conf.subcommand("draft")]  # one a bench, joined by |
)


def main(cfg: Any) -> None:
    """Measure, print one table, and write it as JSON where asked."""
    rows = BENCHES[type(cfg)](cfg)
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")
    if cfg.json:
        cfg.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    with exit_codes():
        flags = (tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes)
        main(tyro.cli(Config, description=__doc__, config=flags, use_underscores=True))  # type: ignore[arg-type]
