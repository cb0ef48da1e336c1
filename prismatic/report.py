"""A rollout folder in (results.jsonl, summary.json), its report.html out: one file beside the videos, for
offline reading.

python -m prismatic.report FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prismatic.errors import ConfigError, exit_codes
from prismatic.evaluation import SUMMARY, read_rows

PAGE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
OPEN_GALLERY = 24  # a section with more episodes than this starts folded, but for the failures


def build(folder: Path) -> Path:
    """Write the folder's report.html and return its path. ConfigError when the folder holds no evaluation."""
    import jinja2

    if not (folder / SUMMARY).is_file():
        raise ConfigError(f"{folder} has no {SUMMARY}: give the folder that eval.py wrote, such as rollouts/EVAL-…")
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    ordered = sorted(
        read_rows(folder), key=lambda row: (row["suite"], row["task_id"], row["init_state"], row["env_seed"])
    )
    sections = [
        {"title": "Failures", "rows": [row for row in ordered if row["success"] is False], "open": True},
        {"title": "Errors", "rows": [row for row in ordered if row["success"] is None], "open": True},
        {"title": "Successes", "rows": [row for row in ordered if row["success"] is True], "open": False},
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(percent=_percent, link=quote, value=_value)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=folder.resolve().name,
        summary=summary,
        judged=summary["successes"] + summary["failures"],
        protocol=_flat(summary["protocol"]),
        sections=[section | {"open": section["open"] or len(section["rows"]) <= OPEN_GALLERY} for section in sections],
    )
    temporary = folder / f".{PAGE}"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(folder / PAGE)
    return folder / PAGE


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    return "–" if value is None else str(value)


def _flat(protocol: dict[str, Any]) -> list[tuple[str, Any]]:
    """One row a fact: nested facts under "outer name"."""
    rows: list[tuple[str, Any]] = []
    for name, value in protocol.items():
        if isinstance(value, dict):
            rows += [(f"{name}: {inner}", item) for inner, item in value.items()]
        else:
            rows.append((name, value))
    return rows


if __name__ == "__main__":
    with exit_codes():
        if len(sys.argv) != 2:
            raise ConfigError("one folder is needed: python -m prismatic.report FOLDER")
        print(build(Path(sys.argv[1])))
