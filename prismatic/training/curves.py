"""A run folder's metrics.jsonl in, its curves.png out: loss, action accuracy, L1 and learning rate over the steps."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.atomic import write_whole
from prismatic.filenames import CURVES, METRICS
from prismatic.records import read_lines

PANELS = (
    ("loss", "loss"),
    ("action_accuracy", "action accuracy"),
    ("l1_loss", "L1, normalised units"),
    ("learning_rate", "learning rate"),
)
SMOOTHED_ROWS = 50  # a thick line is the mean of this many rows, or of a tenth of all


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, [] without one; a last line that was cut off by a crash is left out."""
    path = folder / METRICS
    if not path.exists():
        return []
    return read_lines(path, dict[str, float | str | list[float | None] | None], way_out="delete that line")


def draw(folder: Path) -> Path | None:
    """Write curves.png beside metrics.jsonl; None where there are no rows yet."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and may ask for a screen

    rows = read_metrics(folder)
    if not rows:
        return None
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(folder.resolve().name)
    for axes, (field, title) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS, strict=True):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        steps, values = _column(rows, field)
        if field == "learning_rate":
            axes.plot(steps, values)
        elif len(steps):  # a regression has no accuracy
            width = max(1, min(SMOOTHED_ROWS, len(values) // 10))
            smoothed = np.convolve(values, np.full(width, 1 / width), mode="valid")
            axes.plot(steps, values, color="tab:blue", alpha=0.25)
            axes.plot(steps[width - 1 :], smoothed, color="tab:blue", label="training")
            held_out = _column(rows, f"val_{field}")
            if len(held_out[0]):
                axes.plot(*held_out, color="tab:orange", marker="o", markersize=3, label="held-out episodes")
            axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    write_whole(folder / CURVES, drawn.getvalue())
    return folder / CURVES


def _column(rows: Sequence[dict[str, Any]], field: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have the field, as a number."""
    numbers = [(row.get("step"), row.get(field)) for row in rows]
    pairs = [(step, value) for step, value in numbers if isinstance(step, float) and isinstance(value, float)]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)
