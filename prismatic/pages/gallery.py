"""What the report and the comparison share: episodes as cards with video and action traces, and jinja2's environment.

A card is what pieces.jinja draws. Fields that an older run's results.jsonl lacks (actions, stages, verdict, reason) are left out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from prismatic.episodes.film import FRAMES_PER_SECOND
from prismatic.episodes.result import EpisodeResult, Facts, load_actions
from prismatic.evaluation import poster_name
from prismatic.normalize import ACTION_DIMENSIONS

PAGES = Path(__file__).parent
# Of a trace, in its own units: room for names, length, height of a line's strip, room for the axis; 1 / units of a path.
BOX = {"left": 46, "width": 200, "strip": 24, "foot": 16, "scale": 0.1}
GRIPPER = ACTION_DIMENSIONS.index("gripper")  # 1 open … 0 close
MOST_POINTS = 110  # of a line: more could not be told apart, and 500 episodes share one page
OUTCOMES: dict[bool | None, str] = {True: "success", False: "failure", None: "error"}


def render(template: str, **values: Any) -> bytes:
    """A page of pages/ as UTF-8. Everything that stands in `values` is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        percent=lambda rate: "–" if rate is None else f"{100 * rate:.1f}",
        share=lambda rate: f"{100 * min(max(rate, 0), 1):.2f}%",
        link=quote,
        value=_value,
        plain=plain,
    )
    page = environment.get_template(template).render(box=BOX, frames_per_second=FRAMES_PER_SECOND, **values)
    return page.encode("utf-8", "replace")


def scales(folders: Mapping[Path, Sequence[EpisodeResult]]) -> list[float]:
    """The largest |action| of each dimension in these episodes (folder → rows); 1 where there is no other."""
    found = [load_actions(folder, row.actions) for folder, rows in folders.items() for row in rows]
    largest = [np.abs(np.nan_to_num(actions)).max(axis=0) for actions in found if actions is not None and len(actions)]
    limits = np.max(largest, axis=0) if largest else np.zeros(len(ACTION_DIMENSIONS))
    limits[GRIPPER] = 1
    return [float(limit) or 1.0 for limit in limits]


def card(folder: Path, row: EpisodeResult, limits: Sequence[float]) -> Facts:
    """What pieces.jinja draws of an episode. limits: what `scales` gave, so that all cards of a page are drawn to one scale."""
    outcome = OUTCOMES[row.success]
    poster = poster_name(row.video) if row.video else None
    return {name: getattr(row, name) for name in row.__struct_fields__} | {
        "outcome": outcome,
        "verdict": row.verdict or "",
        # a success and an error say all with their outcome
        "reason": row.reason if outcome == "failure" else None,
        "poster": poster if poster and (folder / poster).is_file() else None,
        "trace": _trace(load_actions(folder, row.actions), row.stages, limits),
    }


def _trace(actions: np.ndarray | None, stages: Mapping[str, int | None], limits: Sequence[float]) -> Facts | None:
    if actions is None or not len(actions):
        return None
    steps, values = len(actions), actions.copy()
    values[:, GRIPPER] = 2 * values[:, GRIPPER] - 1  # 1 open … 0 close fills its strip
    width, height = round(BOX["width"] / BOX["scale"]), round((BOX["strip"] - 6) / BOX["scale"])
    return {
        "steps": steps,
        "lines": [
            {"name": name, "limit": limit, "path": line(column, width=width, height=height, limit=limit)}
            for name, limit, column in zip(ACTION_DIMENSIONS, limits, values.T, strict=True)
        ],
        "stages": [
            {"name": plain(name), "step": step, "x": round(BOX["left"] + BOX["width"] * min(step / steps, 1), 1)}
            for name, step in stages.items()
            if step is not None
        ],
    }


def line(values: np.ndarray, *, width: int, height: int, limit: float) -> str:
    """An SVG path in a box of width × height: first to last of `values` from left to right, limit at the top, -limit at the bottom."""
    chosen = np.unique(np.linspace(0, len(values) - 1, min(len(values), MOST_POINTS)).round().astype(int))
    across = np.round(chosen / max(len(values) - 1, 1) * width).astype(int)
    clipped = np.clip(np.nan_to_num(values[chosen]) / limit, -1, 1)
    down = np.round((1 - clipped) / 2 * height).astype(int)
    steps = zip(np.diff(across), np.diff(down), strict=True)
    return f"M{across[0]} {down[0]}" + "".join(f"l{dx} {dy}" for dx, dy in steps)


def plain(code: str) -> str:
    """A code such as closed_beside in words."""
    return code.replace("_", " ")


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)
