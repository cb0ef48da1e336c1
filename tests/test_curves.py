"""curves.png from metrics.jsonl: a picture, also of a log that a crash cut off."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prismatic.errors import ConfigError
from prismatic.training import curves


def write_rows(folder: Path, count: int, *, held_out: bool = True) -> None:
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(10, 10 * count + 1, 10):
            row = {
                "step": step,
                "loss": 100 / step,
                "action_accuracy": 1 - 5 / step,
                "l1_loss": 3 / step,
                "learning_rate": 1e-3,
            }
            if held_out and step % 50 == 0:
                row |= {
                    "val_loss": 200 / step,
                    "val_action_accuracy": 0.5,
                    "val_l1_loss": 0.1,
                    "val_l1_loss_per_dimension": [0.1] * 7,
                }
            stream.write(json.dumps(row) + "\n")


def shows(path: Path, colour: tuple[int, int, int]) -> bool:
    assert path.read_bytes().startswith(b"\x89PNG")
    return bool((np.asarray(Image.open(path).convert("RGB")) == colour).all(axis=-1).any())


def test_training_and_validation_have_a_line_each(tmp_path: Path) -> None:
    blue, orange = (31, 119, 180), (255, 127, 14)
    write_rows(tmp_path, 100)
    picture = tmp_path / "curves.png"
    assert curves.draw(tmp_path) == picture and shows(picture, blue) and shows(picture, orange)
    write_rows(tmp_path, 100, held_out=False)
    curves.draw(tmp_path)
    assert shows(picture, blue) and not shows(picture, orange)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


@pytest.mark.parametrize("count", [1, 2, 15])
def test_few_rows_are_enough(tmp_path: Path, count: int) -> None:
    write_rows(tmp_path, count)
    assert curves.draw(tmp_path) is not None


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    assert curves.read_metrics(tmp_path) == [] and curves.draw(tmp_path) is None
    write_rows(tmp_path, 3)
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole[:-20])
    assert [row["step"] for row in curves.read_metrics(tmp_path)] == [10, 20]
    (tmp_path / "metrics.jsonl").write_text("{" + whole)
    with pytest.raises(ConfigError, match="line 1 is not valid JSON"):
        curves.read_metrics(tmp_path)
