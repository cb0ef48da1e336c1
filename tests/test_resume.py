"""Nothing is lost: a run that is killed at any moment, or finds its checkpoint damaged, its disk full or its numbers bad."""

import dataclasses
import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
from config import FinetuneConfig
from prismatic.data.frames import FrameCache, Mixture
from prismatic.errors import ConfigError
from prismatic.processor import Batch
from tests.drawn_run import finish, rows, run_folder, start

pytest_plugins = ["tests.drawn_run"]

KILLS = 3  # of one run, at random moments
SLOWEST_STEP = 0.3  # seconds; a kill comes within this time of a random step


def same_adapters(mine: Path, theirs: Path) -> bool:
    one, two = (load_file(folder / "latest" / "adapter_model.safetensors") for folder in (mine, theirs))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def whole(cfg: FinetuneConfig) -> FinetuneConfig:
    """A run that nothing happened to: with dropout, whose random numbers have to go on as well."""
    whole = dataclasses.replace(cfg, lora_dropout=0.1, max_steps=8, run_id_note="whole")
    finetune.main(whole)
    return whole


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(whole: FinetuneConfig) -> None:
    killed = dataclasses.replace(whole, run_id_note="killed")
    run, rng = run_folder(killed), random.Random(0)
    for last in sorted(rng.sample(range(1, 8), KILLS)):
        (process,) = start(killed)
        while process.is_alive() and not ((run / "metrics.jsonl").exists() and rows_there(run) >= last):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, SLOWEST_STEP))
        process.kill()
        assert finish([process])[0] in (-signal.SIGKILL, 0)
    # Once more, inside a save, when half of the state is written.
    (process,) = start(dataclasses.replace(killed, save_steps=1), before=lambda rank: kill_inside_save())
    assert finish([process])[0] in (-signal.SIGKILL, 0)
    assert finish(start(killed)) == [0]
    assert rows(run) == rows(run_folder(whole)) and len(rows(run)) == 8
    assert same_adapters(run, run_folder(whole))
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


@pytest.mark.parametrize("file", ["training_state.pt", "adapter_model.safetensors", "SHA256SUMS"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    cfg: FinetuneConfig, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.main(cfg)
    run = run_folder(cfg)
    before, last = rows(run), (run / "step-000004" / "adapter_model.safetensors").read_bytes()
    damaged = run / "step-000004" / file
    damaged.write_bytes(damaged.read_bytes()[: -100 if file != "SHA256SUMS" else 0])
    finetune.main(cfg)
    said = capsys.readouterr().out
    assert f"step-000004 is damaged ({file}" in said
    assert "step-000002 takes its place" in said and (run / "damaged-step-000004").is_dir()
    assert rows(run) == before and (run / "latest" / "adapter_model.safetensors").read_bytes() == last


def test_a_flipped_bit_is_seen_and_no_checkpoint_left_is_one_sentence(cfg: FinetuneConfig) -> None:
    finetune.main(dataclasses.replace(cfg, max_steps=1))
    state = run_folder(cfg) / "step-000001" / "training_state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(ConfigError, match=r"step-000001 is damaged \(training_state.pt.*delete .* to begin again"):
        finetune.main(cfg)
    assert state.exists()


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(cfg: FinetuneConfig) -> None:
    """A limit on the size of files stands in for a full disk: writing fails half-way, in the same place."""
    finetune.main(dataclasses.replace(cfg, max_steps=1))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"step-000002 \(.*\): make room; the same command then continues"):
            finetune.main(dataclasses.replace(cfg, max_steps=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    run = run_folder(cfg)
    assert [folder.name for folder in run.glob("step-*")] == ["step-000001"] and not list(run.glob(".unfinished*"))
    finetune.main(dataclasses.replace(cfg, max_steps=2))
    assert (run / "latest").resolve().name == "step-000002"


def test_a_folder_that_cannot_be_written_is_one_sentence(cfg: FinetuneConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--run_root_dir .*file can't be written \(Not a directory\)"):
        finetune.main(dataclasses.replace(cfg, run_root_dir=tmp_path / "file"))


def poison(monkeypatch: pytest.MonkeyPatch, *bad: int) -> None:
    """Make the pictures of these steps (from 0) not a number."""
    batches = finetune.batches

    def poisoned(examples: object, draws: object, **how: object) -> Iterator[Batch]:
        for number, batch in enumerate(batches(examples, draws, **how)):  # pyright: ignore[reportArgumentType]
            if number // 2 in bad:
                batch.pixel_values *= float("nan")
            yield batch

    monkeypatch.setattr(finetune, "batches", poisoned)


def test_a_bad_step_is_skipped_and_its_frames_are_named(
    cfg: FinetuneConfig, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, 1)
    cfg = dataclasses.replace(cfg, save_steps=1, keep=4)
    finetune.main(cfg)
    run, mixture = run_folder(cfg), Mixture([FrameCache(place / "cache")], seed=cfg.seed)
    frames = [list(mixture.origin(draw)) for draw in range(4, 8)]
    (row,) = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert row["step"] == 2 and row["frames"] == frames and "loss nan" in row["reason"]
    dataset, episode, frame = frames[0]
    assert (
        f"step 2 skipped: loss nan, gradient norm nan; its batch: {dataset} episode {episode} frame {frame}, "
        in capsys.readouterr().err
    )
    assert [row["step"] for row in rows(run)] == [1, 3, 4]
    one, two, three = (load_file(run / f"step-00000{n}" / "adapter_model.safetensors") for n in (1, 2, 3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


def test_bad_steps_in_a_row_end_the_run(cfg: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 0, 2, 3)
    with pytest.raises(ConfigError, match=r"^2 steps in a row .*skipped\.jsonl.*--learning_rate"):
        finetune.main(dataclasses.replace(cfg, max_steps=9, save_steps=9, max_bad_steps=2))
    assert (run_folder(cfg) / "latest").resolve().name == "step-000004"
