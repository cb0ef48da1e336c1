"""Training runs small enough for tests: a base model with random weights and LeRobot data sets of drawn images, so no TensorFlow is started."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

import finetune
from config import FinetuneConfig
from prismatic.data.frames import Mixture
from prismatic.data.lerobot_writer import write_dataset
from prismatic.data.mixture import open_mixture
from prismatic.data.staging import stage_episode
from prismatic.errors import exit_codes
from prismatic.models.tiny import TINY, random_vla
from prismatic.training import curves, first_batch
from tests.drawn_checkpoint import saved
from tests.drawn_episodes import drawn_episode

SMALL = dataclasses.replace(
    TINY, image_size=64,
    tiny_timm_kwargs={name: {**sizes, "embed_dim": 48, "depth": 2} for name, sizes in TINY.tiny_timm_kwargs.items()},
    text_config=dataclasses.replace(TINY.text_config, hidden_size=64, intermediate_size=128, num_hidden_layers=2),
)  # fmt: skip
EPISODES = (4, 0, 1, 2)  # of 6, 2, 3 and 4 steps


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds base, and in data two sets of the same episodes: drawn, and arms, whose actions have 14 numbers."""
    place = tmp_path_factory.mktemp("place")
    saved(place / "base", random_vla(SMALL, seed=0))
    for name in ("drawn", "arms"):
        for number, episode in enumerate(map(drawn_episode, EPISODES)):
            if name == "arms":
                episode["action"] = np.concatenate([episode["action"], episode["action"][::-1]], axis=1)
            stage_episode(place / "staged" / name / f"episode_{number}.npz", **episode)
        write_dataset(place / "staged" / name, place / "data", name)
    return place


def config(place: Path, runs: Path) -> FinetuneConfig:
    """A run of four steps of four samples; every step is logged."""
    return FinetuneConfig(
        vla_path=str(place / "base"), data_root_dir=str(place / "data"), dataset_name="drawn", cache_dir=place / "cache", run_root_dir=runs,
        batch_size=2, grad_accumulation_steps=2, lora_rank=4, max_steps=4, save_steps=2, log_steps=1, num_workers=0,
    )  # fmt: skip


def leave_out_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the memory plan nor pictures, which take most of a small run's time; test_training_model.py and torchrun's test have them."""
    monkeypatch.setattr(finetune, "plan_training", lambda *model, **sizes: False)
    for module in (curves, first_batch):
        monkeypatch.setattr(module, "draw", lambda *shown: None)


@pytest.fixture
def cfg(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FinetuneConfig:
    leave_out_extras(monkeypatch)
    return config(place, tmp_path / "runs")


@pytest.fixture(scope="session")
def finished(place: Path) -> Path:
    """The folder of a run that ended after one step."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        leave_out_extras(monkeypatch)
        return finetune.main(dataclasses.replace(config(place, place / "runs"), max_steps=1)).parent


@pytest.fixture
def begun(cfg: FinetuneConfig, finished: Path) -> FinetuneConfig:
    """A run whose first step is done."""
    shutil.copytree(finished, run_folder(cfg), symlinks=True)
    return cfg


def drawn_mixture(place: Path, name: str = "drawn", **how: float) -> Mixture:
    return open_mixture(str(place / "data"), name, cache_dir=place / "cache", **how)  # pyright: ignore[reportArgumentType]


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
