"""A rollout folder without videos, made from a few invented rows, and a reader of the page that is made from it."""

import html.parser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from prismatic import evaluation
from prismatic.atomic import write_json
from prismatic.episodes.result import EpisodeResult
from prismatic.summary import summarise


class Reader(html.parser.HTMLParser):
    """Collects the texts, the videos with their attributes, and every tag that could reach outside the folder."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.videos: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.unclosed: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.unclosed.append(tag)
        if tag == "video":
            self.videos.append(dict(attrs))
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts += [data.strip()] if data.strip() else []


def row(
    task_id: int,
    state: int,
    success: bool | None,
    error: str | None = None,
    suite: str = "libero_spatial",
    **facts: Any,
) -> EpisodeResult:
    """An episode as it would stand in results.jsonl."""
    instruction = f"pick up bowl {task_id} & <place> it"
    name = evaluation.video_name(50 * task_id + state + 1, bool(success), instruction)
    known = {
        "instruction": instruction,
        "init_state": state,
        "env_seed": 0,
        "steps": 87 + state,
        "seconds": 1.0,
        "video": None if error else name,
    }
    return EpisodeResult(
        episode_id=f"{suite}/task{task_id}/state{state}/seed0",
        suite=suite,
        task_id=task_id,
        success=success,
        error=error,
        **known | facts,
    )


def folder_with(path: Path, rows: Sequence[EpisodeResult], protocol: dict[str, Any] | None = None) -> Path:
    """A rollout folder that holds them."""
    path.mkdir(exist_ok=True)
    (path / "results.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in rows))
    protocol = protocol or {"render_quality": "standard", "versions": {"mujoco": "3.2.3"}, "center_crop": None}
    write_json(path / "summary.json", summarise(rows, protocol=protocol))
    return path
