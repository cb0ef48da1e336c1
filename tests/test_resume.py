"""Nothing is lost: a run that is killed at any moment, inside a save too, or whose numbers are bad."""

import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finetune
from config import FinetuneConfig
from prismatic.errors import ConfigError
from prismatic.processor import Batch
from tests.drawn_run import drawn_mixture, finish, rows, run_folder, start

pytest_plugins = ["tests.drawn_run"]

KILLS = 2  # of one run, at random moments
SLOWEST_STEP = 0.3  # seconds; a kill comes within this time of a random step


def same_adapters(mine: Path, theirs: Path) -> bool:
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (mine, theirs))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(cfg: FinetuneConfig) -> None:
    # with dropout, whose random numbers have to go on as well
    whole = dataclasses.replace(cfg, lora_dropout=0.1, max_steps=6, run_id_note="whole")
    finetune.main(whole)
    killed = dataclasses.replace(whole, run_id_note="killed")
    run, rng = run_folder(killed), random.Random(0)
    # First inside a save, when half of the state is written.
    (process,) = start(dataclasses.replace(killed, save_steps=1), before=lambda rank: kill_inside_save())
    assert finish([process]) == [-signal.SIGKILL]
    for last in sorted(rng.sample(range(1, 6), KILLS)):
        (process,) = start(killed)
        while process.is_alive() and not ((run / "metrics.jsonl").exists() and rows_there(run) >= last):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, SLOWEST_STEP))
        process.kill()
        assert finish([process])[0] in (-signal.SIGKILL, 0)
    assert finish(start(killed)) == [0]
    assert rows(run) == rows(run_folder(whole)) and len(rows(run)) == 6
    assert same_adapters(run / "latest", run_folder(whole) / "latest")
    assert not list(run.glob(".unfinished*"))


def rows_there(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def kill_inside_save() -> None:
    save = torch.save

    def half(state: object, path: Path) -> None:
        save(state, path)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half  # pyright: ignore[reportAttributeAccessIssue]


def test_weights_that_became_nan_are_not_saved_over_good_ones(
    cfg: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = finetune.backward

    def poisoned(model: torch.nn.Module, *given: Any, **how: Any) -> dict[str, float]:
        numbers = taken(model, *given, **how)
        if poisoned_from.pop(0) == 3:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return numbers

    poisoned_from = [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(finetune, "backward", poisoned)
    cfg = dataclasses.replace(cfg, save_steps=2, keep=2, max_steps=6, max_bad_steps=9)
    with pytest.raises(ConfigError, match=r"^after step 4 weights are NaN or infinite.*--learning_rate"):
        finetune.main(cfg)
    assert [folder.name for folder in run_folder(cfg).glob("step-*")] == ["step-000002"]
    assert (run_folder(cfg) / "latest").resolve().name == "step-000002"


def test_bad_steps_are_skipped_their_frames_named_and_many_in_a_row_end_the_run(
    cfg: FinetuneConfig, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = finetune.batches

    def poisoned(examples: object, draws: object, **how: object) -> Iterator[Batch]:
        for number, batch in enumerate(taken(examples, draws, **how)):  # pyright: ignore[reportArgumentType]
            if number // 2 in (1, 3, 4):  # of the steps from 0
                batch.pixel_values *= float("nan")
            yield batch

    monkeypatch.setattr(finetune, "batches", poisoned)
    cfg = dataclasses.replace(cfg, save_steps=1, keep=9, max_steps=9, max_bad_steps=2)
    with pytest.raises(ConfigError, match=r"^2 steps in a row .*skipped\.jsonl.*--learning_rate"):
        finetune.main(cfg)
    run, mixture = run_folder(cfg), drawn_mixture(place, seed=cfg.seed)
    assert [row["step"] for row in rows(run)] == [1, 3] and (run / "latest").resolve().name == "step-000005"
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped] == [2, 4, 5]
    assert skipped[0]["frames"] == [list(mixture.origin(draw)) for draw in range(4, 8)]
    dataset, episode, frame = skipped[0]["frames"][0]
    reason = "loss nan, gradient norm nan"
    assert skipped[0]["reason"] == reason
    assert (
        f"step 2 skipped: {reason}; its batch: {dataset} episode {episode} frame {frame}, " in capsys.readouterr().err
    )
    assert same_adapters(run / "step-000001", run / "step-000002")
    assert not same_adapters(run / "step-000001", run / "step-000003")
