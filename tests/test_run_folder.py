"""A run on disk: which step folders stay, and what a killed run leaves."""

from pathlib import Path

import pytest
import torch

from prismatic.errors import ConfigError
from prismatic.training.run_folder import RunFolder


def nothing(folder: Path) -> None:
    """What a checkpoint holds here."""


def names(run: RunFolder) -> list[str]:
    return [folder.name for folder in run.checkpoints()]


def test_checkpoints_are_in_order_past_a_million(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, keep=2)
    for step in (999_000, 1_000_000, 1_001_000):
        run.save(step, nothing, {})
    assert names(run) == ["step-1000000", "step-1001000"]


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, keep=2)
    assert run.best() is None
    for step in range(1, 6):
        run.save(step, nothing, {})
        if step in (1, 2):
            run.mark_best(step, 1 / step)
    assert names(run) == ["step-000002", "step-000004", "step-000005"]
    assert run.best() == {"step": 2, "value": 0.5} and (tmp_path / "best").resolve().name == "step-000002"
    run.mark_best(5, 0.1)
    assert names(run) == ["step-000004", "step-000005"] and (tmp_path / "best").resolve().name == "step-000005"
    with pytest.raises(ValueError, match="step 6 is not saved"):
        run.mark_best(6, 0.0)
    del run
    assert RunFolder(tmp_path, keep=2).best() == {"step": 5, "value": 0.1}


def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-step-000003.partial").mkdir()
    (tmp_path / ".unfinished-finetune.json").write_text("{")
    RunFolder(tmp_path, keep=2)
    assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("CUDA error: launch failed")])
def test_what_a_gpu_says_while_saving_is_not_taken_for_a_full_disk(tmp_path: Path, error: Exception) -> None:
    run = RunFolder(tmp_path, keep=2)

    def write(folder: Path) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        run.save(1, write, {})
    assert not names(run) and not list(tmp_path.glob(".unfinished*"))


def test_one_process_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, keep=2)
    with pytest.raises(ConfigError, match="another process"):
        RunFolder(tmp_path, keep=2)
    del run


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, keep=1).save(1, nothing, {"step": 1})
    (line,) = (folder / "SHA256SUMS").read_text().splitlines()
    digest, name = line.split("  ")
    assert name == "training_state.pt" and len(digest) == 64
