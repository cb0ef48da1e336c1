"""A training run small enough for tests: a base model with random weights and a frame cache of drawn pictures, made without TensorFlow."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

import finetune
from config import FinetuneConfig
from prismatic.checkpoint import save_checkpoint
from prismatic.data.frames import FrameCache, Mixture
from prismatic.errors import exit_codes
from prismatic.models.tiny import TINY, random_vla, tiny_tokenizer
from prismatic.processor import Processor, ProcessorConfig
from prismatic.training import setup
from tests.drawn_cache import write_cache
from tests.drawn_episodes import drawn_episode

EPISODES = 4


def save_base(place: Path) -> None:
    """A base model with random weights in place/base."""
    words = tiny_tokenizer(["put block 1 on the plate"])
    words.save_pretrained(place / "words")
    save_checkpoint(
        place / "base",
        random_vla(TINY, seed=0),
        processor=Processor(ProcessorConfig.for_model(TINY, unnorm_key=None, center_crop=True), words, {}),
        statistics={},
        tokenizer_from=place / "words",
        dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_base(place)
    write_cache(place / "cache", [drawn_episode(number) for number in range(EPISODES)])
    return place


@pytest.fixture
def cfg(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FinetuneConfig:
    """A run of four steps of four samples; every step is logged."""
    monkeypatch.setattr(
        setup,
        "open_mixture",
        lambda root, name, *, seed, val_share, num_actions_chunk, **how: Mixture(
            [FrameCache(place / "cache")], seed=seed, val_share=val_share, num_actions_chunk=num_actions_chunk
        ),
    )
    return FinetuneConfig(
        data_root_dir=str(place),
        log_steps=1,
        vla_path=str(place / "base"),
        dataset_name="drawn",
        run_root_dir=tmp_path / "runs",
        batch_size=2,
        grad_accumulation_steps=2,
        lora_rank=4,
        max_steps=4,
        save_steps=2,
        num_workers=0,
    )


def run_folder(cfg: FinetuneConfig) -> Path:
    return cfg.run_root_dir / cfg.run_name


def rows(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what differs between two equal runs, speed and memory; lists are spread over fields of their own."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["samples_per_second"], line["ram_gib"]
        for name in [name for name, value in line.items() if isinstance(value, list)]:
            line |= {f"{name}_{place}": value for place, value in enumerate(line.pop(name))}
    return lines


def start(
    cfg: FinetuneConfig, *, ranks: int = 1, before: Callable[[int], None] = lambda rank: None
) -> list[BaseProcess]:
    """finetune.py in forked processes, which need not import torch again; `before` is called in each with its rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def body(rank: int) -> None:
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        before(rank)
        with exit_codes():
            finetune.main(cfg)

    processes = [multiprocessing.get_context("fork").Process(target=body, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return list(processes)


def finish(processes: list[BaseProcess]) -> list[int | None]:
    """Their exit codes."""
    for process in processes:
        process.join(timeout=240)
    return [process.exitcode for process in processes]
