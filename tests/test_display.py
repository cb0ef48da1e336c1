"""What a person sees of a run: the bar's fields, the rows of metrics.jsonl, the same numbers in the logger, curves.png, first_batch.png."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prismatic.errors import ConfigError
from prismatic.models.tiny import TINY
from prismatic.processor import Processor, ProcessorConfig
from prismatic.training import curves, display, first_batch
from prismatic.training.display import Display
from prismatic.training.loggers import Logger
from prismatic.training.run_folder import RunFolder
from prismatic.training.state import Progress
from tests.drawn_checkpoint import drawn_processor

HELD_OUT = {"val_loss": 2.0, "val_action_accuracy": 0.25, "val_l1_loss": 0.5, "val_l1_loss_per_dimension": [0.5] * 7, "val_frames": 3}  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def run_steps(folder: Path, clock: list[float], *, first: int = 0, last: int = 5) -> tuple[str, list]:
    """Two seconds and eight samples a step, a validation of an hour after step 3; returns the bar's last state and what was logged."""
    progress, logged = Progress(effective_batch=8, step=first, learning_rate=1e-4), []
    logger = Logger(lambda step, values: logged.append((step, values)), lambda: logged.append("closed"))
    with Display(RunFolder(folder, keep=1), logger, progress, max_steps=last, log_steps=2) as shown:
        for done in range(first + 1, last + 1):
            clock[0] += 2
            with shown.paused("validation"):
                clock[0] += 3600 * (done == 3)
            progress.step = done
            shown.step({"loss": 1.5, "l1_loss": 0.75, "action_accuracy": 0.125}, HELD_OUT if done == 3 else {})
        return str(shown.bar), logged


def test_the_bar_and_the_rows(tmp_path: Path, clock: list[float]) -> None:
    bar, logged = run_steps(tmp_path, clock)
    for shown in ("5/5", "loss=1.500", "acc=0.125", "l1=0.750", "samples/s=4", "ram=", "GiB", "<"):  # elapsed<remaining
        assert shown in bar
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [2, 3, 4, 5]  # when due, and with every validation
    usual = {"step", "loss", "action_accuracy", "l1_loss", "learning_rate", "samples_per_second", "ram_gib"}
    assert all(usual <= set(row) for row in rows)
    assert [{name for name in row if name.startswith("val_")} for row in rows] == [set(), {*HELD_OUT}, set(), set()]
    assert [row["samples_per_second"] for row in rows] == [4.0] * 4  # the hour doesn't count
    assert 0.01 < rows[0]["ram_gib"] < 100
    assert logged.pop() == "closed" and [step for step, _ in logged] == [2, 3, 4, 5]
    assert logged[1][1]["val/l1_loss_per_dimension/gripper"] == 0.5 and logged[0][1]["train/loss"] == 1.5


def test_a_resumed_bar_begins_where_the_run_stands(tmp_path: Path, clock: list[float]) -> None:
    bar, logged = run_steps(tmp_path, clock, first=9, last=12)
    assert "12/12" in bar and [step for step, _ in logged[:-1]] == [10, 12]


def test_a_validation_that_gave_no_number_does_not_end_the_curves(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, keep=1)
    for step, loss in ((1, 2.0), (2, float("nan")), (3, 1.0)):
        folder.log({"step": step, "loss": 1.0, "val_loss": loss, "val_l1_loss_per_dimension": [loss, 1.0]})
    rows = curves.read_metrics(tmp_path)
    assert [row["val_loss"] for row in rows] == [2.0, None, 1.0] and rows[1]["val_l1_loss_per_dimension"] == [None, 1.0]
    assert curves.draw(tmp_path) == tmp_path / "curves.png"


def test_curves_that_cannot_be_written_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(folder: Path) -> None:
        raise ConfigError("cannot write curves.png (No space left on device)")

    monkeypatch.setattr(display.curves, "draw", full)
    with Display(RunFolder(tmp_path, keep=1), Logger(), Progress(effective_batch=8), max_steps=3, log_steps=2) as shown:
        shown.draw_curves()
    assert "notice: cannot write curves.png (No space left on device)" in capsys.readouterr().out


def write_rows(folder: Path, count: int, *, held_out: bool = True) -> None:
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(10, 10 * count + 1, 10):
            row = {"step": step, "loss": 100 / step, "action_accuracy": 1 - 5 / step, "l1_loss": 3 / step, "learning_rate": 1e-3}  # fmt: skip
            if held_out and step % 50 == 0:
                row |= {"val_loss": 200 / step, "val_action_accuracy": 0.5, "val_l1_loss": 0.1, "val_l1_loss_per_dimension": [0.1] * 7}  # fmt: skip
            stream.write(json.dumps(row) + "\n")


def shows(path: Path, colour: tuple[int, int, int]) -> bool:
    assert path.read_bytes().startswith(b"\x89PNG")
    return bool((np.asarray(Image.open(path).convert("RGB")) == colour).all(axis=-1).any())


def test_training_and_validation_have_a_line_each(tmp_path: Path) -> None:
    blue, orange, picture = (31, 119, 180), (255, 127, 14), tmp_path / "curves.png"
    assert curves.read_metrics(tmp_path) == [] and curves.draw(tmp_path) is None
    for count, held_out in ((1, False), (60, True), (60, False)):
        write_rows(tmp_path, count, held_out=held_out)
        assert curves.draw(tmp_path) == picture and shows(picture, blue) and shows(picture, orange) == held_out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    write_rows(tmp_path, 3)
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole[:-20])
    assert [row["step"] for row in curves.read_metrics(tmp_path)] == [10, 20]
    (tmp_path / "metrics.jsonl").write_text("{" + whole)
    with pytest.raises(ConfigError, match="line 1 is not valid JSON"):
        curves.read_metrics(tmp_path)


def test_the_first_batch_shows_every_image_and_what_is_learnt(tmp_path: Path) -> None:
    processor = drawn_processor()
    said, action = "Put the <red> bowl in $5?\nOut: the drawer", np.linspace(-0.95, 0.95, 7)
    colours = [(255, 0, 0), (0, 200, 0), (0, 0, 255), (10, 20, 30)]
    frames = [np.full((64, 64, 3), colour, np.uint8) for colour in colours]
    batch = processor.collate([processor.example(frames[start : start + 2], said, action) for start in (0, 2)])
    first_batch.draw([batch], processor, tmp_path / "sheet.png")
    assert all(shows(tmp_path / "sheet.png", colour) for colour in [*colours, (255, 255, 255), (0, 0, 0)])
    text = first_batch.words(batch, 1, processor)
    assert said.lower() in text and "x -0.9" in text and "roll +0.0" in text and "gripper +0.9" in text
    several = Processor(ProcessorConfig.for_model(TINY, unnorm_key=None, center_crop=True), processor.tokenizer, {})
    assert "normalised: x -0.9" in first_batch.words(batch, 1, several)
