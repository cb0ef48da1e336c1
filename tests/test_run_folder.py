"""A run on disk: which step folders stay, and what a killed run leaves."""

from pathlib import Path

import pytest
import torch

from prismatic.errors import ConfigError
from prismatic.sums import read_sums
from prismatic.training.run_folder import RunFolder


def nothing(folder: Path) -> None:
    """What a checkpoint holds here."""


def names(run: RunFolder) -> list[str]:
    return [folder.name for folder in run.checkpoints()]


def test_the_newest_stay_also_past_a_million_and_the_best_beside_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, keep=2)
    assert run.best() is None and run.is_best(9.0)
    for step in (998_000, 999_000, 1_000_000, 1_001_000):
        run.save(step, nothing, {"step": step})
        if step < 1_000_000:
            run.mark_best(step, 1e6 - step)
    assert names(run) == ["step-999000", "step-1000000", "step-1001000"]
    assert run.best() == {"step": 999_000, "value": 1000.0} and (tmp_path / "best").resolve().name == "step-999000"
    assert run.is_best(999.0) and not run.is_best(1000.0)
    run.mark_best(1_001_000, 0.1)
    assert names(run) == ["step-1000000", "step-1001000"] and (tmp_path / "best").resolve().name == "step-1001000"
    assert read_sums(tmp_path / "latest").keys() == {"training_state.pt"}
    with pytest.raises(ConfigError, match="another process"):
        RunFolder(tmp_path, keep=2)
    del run
    (tmp_path / ".unfinished-step-000003.partial").mkdir()  # of a killed run
    (tmp_path / ".unfinished-finetune.json").write_text("{")
    assert RunFolder(tmp_path, keep=2).best() == {"step": 1_001_000, "value": 0.1}
    assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("CUDA error: launch failed")])
def test_what_a_gpu_says_while_saving_is_not_taken_for_a_full_disk(tmp_path: Path, error: Exception) -> None:
    run = RunFolder(tmp_path, keep=2)

    def write(folder: Path) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        run.save(1, write, {})
    assert not names(run) and not list(tmp_path.glob(".unfinished*"))
