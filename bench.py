"""Measure: `python bench.py load | eval | infer | draft`. One table, and the same as JSON with --json FILE.

python bench.py load                              a full-size folder with random weights (15 GB of disk, 16 GB of memory)
python bench.py load --checkpoint FOLDER          a folder of yours
python bench.py eval --workers 2 4                episodes an hour: simulators side by side against one alone
python bench.py infer --plot latency.png          time and memory of an action: full size and random on a GPU, the small model on a CPU
python bench.py draft --task_ids 1 2              what drafting saves in episodes of the small model
"""

import json
from typing import Annotated, Any

import tyro

from config import WORKSPACE, BenchDraftConfig, BenchEvalConfig, BenchInferConfig, BenchLoadConfig
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


def infer(cfg: BenchInferConfig) -> Rows:
    """Ways of decoding: the plain one, the plain one at its best, ours."""
    import torch

    from prismatic.bench import infer

    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = cfg.checkpoint or (None if cfg.full_size or device != "cpu" else "checkpoints/openvla-tiny")
    rows = infer.run(
        resolve(checkpoint) if checkpoint else None,
        batch_sizes=cfg.batch_sizes,
        precisions=cfg.quantize,
        rounds=cfg.rounds,
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
        task_ids=cfg.task_ids,
        num_trials=cfg.num_trials_per_task,
        quality=cfg.render_quality,
    )


BENCHES = {BenchLoadConfig: load, BenchEvalConfig: evaluation, BenchInferConfig: infer, BenchDraftConfig: draft}
Config = (
    Annotated[BenchLoadConfig, tyro.conf.subcommand("load")]
    | Annotated[BenchEvalConfig, tyro.conf.subcommand("eval")]
    | Annotated[BenchInferConfig, tyro.conf.subcommand("infer")]
    | Annotated[BenchDraftConfig, tyro.conf.subcommand("draft")]  # one a bench, joined by |
)


def main(cfg: BenchLoadConfig | BenchEvalConfig | BenchInferConfig | BenchDraftConfig) -> None:
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
