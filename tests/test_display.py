"""What a person sees of a run: the bar's fields, the rows of metrics.jsonl, the same numbers in the logger."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from prismatic.errors import ConfigError
from prismatic.training import display
from prismatic.training.display import Display
from prismatic.training.loggers import NoLogger
from prismatic.training.metrics import Metrics
from prismatic.training.run_folder import RunFolder
from prismatic.training.state import Progress

HELD_OUT = {
    "val_loss": 2.0,
    "val_action_accuracy": 0.25,
    "val_l1_loss": 0.5,
    "val_l1_loss_per_dimension": [0.5] * 7,
    "val_frames": 3,
}


class Kept(NoLogger):
    def __init__(self) -> None:
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.closed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, values))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def run_steps(run: RunFolder, logger: Kept, clock: list[float], *, first: int = 0, last: int = 5) -> str:
    """Two seconds and eight samples a step, a validation of an hour after step 3; returns the bar's last state."""
    progress = Progress(effective_batch=8, step=first, learning_rate=1e-4)
    with Display(run, logger, progress, max_steps=last, log_steps=2) as shown:
        for done in range(first + 1, last + 1):
            clock[0] += 2
            with shown.paused("validation"):
                clock[0] += 3600 * (done == 3)
            progress.step = done
            shown.step(Metrics(loss=1.5, l1_loss=0.75, action_accuracy=0.125), HELD_OUT if done == 3 else {})
        return str(shown.bar)


def test_the_bar_shows_what_people_ask_for(tmp_path: Path, clock: list[float]) -> None:
    bar = run_steps(RunFolder(tmp_path, keep=1), Kept(), clock)
    assert "5/5" in bar and "loss=1.500" in bar and "acc=0.125" in bar and "l1=0.750" in bar and "samples/s=4" in bar
    assert "ram=" in bar and "GiB" in bar
    assert "<" in bar  # tqdm's elapsed<remaining


def test_rows_come_when_due_and_with_every_validation(tmp_path: Path, clock: list[float]) -> None:
    logger = Kept()
    run_steps(RunFolder(tmp_path, keep=1), logger, clock)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [2, 3, 4, 5]
    usual = {"step", "loss", "action_accuracy", "l1_loss", "learning_rate", "samples_per_second", "ram_gib"}
    assert all(usual <= set(row) for row in rows)
    assert {name for name in rows[1] if name.startswith("val_")} == set(HELD_OUT)
    assert not any(name.startswith("val_") for row in (rows[0], *rows[2:]) for name in row)
    assert [row["samples_per_second"] for row in rows] == [4.0] * 4  # the hour doesn't count
    assert 0.01 < rows[0]["ram_gib"] < 100
    assert [step for step, _ in logger.rows] == [2, 3, 4, 5] and logger.closed
    assert logger.rows[1][1]["val/l1_loss_per_dimension/gripper"] == 0.5 and logger.rows[0][1]["train/loss"] == 1.5


def test_a_resumed_bar_begins_where_the_run_stands(tmp_path: Path, clock: list[float]) -> None:
    logger = Kept()
    assert "12/12" in run_steps(RunFolder(tmp_path, keep=1), logger, clock, first=9, last=12)
    assert [step for step, _ in logger.rows] == [10, 12]


def test_curves_that_cannot_be_written_end_nothing(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(folder: Path) -> None:
        raise ConfigError("cannot write curves.png (No space left on device)")

    monkeypatch.setattr(display.curves, "draw", full)
    with Display(RunFolder(tmp_path, keep=1), Kept(), Progress(effective_batch=8), max_steps=3, log_steps=2) as shown:
        shown.draw_curves()
    assert "notice: cannot write curves.png (No space left on device)" in capsys.readouterr().out
