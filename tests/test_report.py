"""report.py on a folder as eval.py leaves it."""

import html.parser
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from prismatic import evaluation, report
from prismatic.errors import ConfigError


class Reader(html.parser.HTMLParser):
    """Collects the texts, the videos with their attributes, and every tag that could reach outside the
    folder.
    """

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

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts += [data.strip()] if data.strip() else []


def row(task_id: int, state: int, success: bool | None, error: str | None = None) -> dict[str, Any]:
    name = evaluation.video_name(50 * task_id + state + 1, bool(success), f"pick up bowl {task_id} & <place> it")
    return {
        "episode_id": f"libero_spatial/task{task_id}/state{state}/seed0",
        "suite": "libero_spatial",
        "task_id": task_id,
        "init_state": state,
        "env_seed": 0,
        "instruction": f"pick up bowl {task_id} & <place> it",
        "success": success,
        "error": error,
        "steps": 87 + state,
        "seconds": 1.0,
        "video": None if error else name,
        "actions_sha256": "0",
    }


ROWS = [
    *(row(0, state, True) for state in range(9)),
    row(0, 9, False),
    *(row(1, state, state % 2 == 0) for state in range(10)),
    row(2, 0, None, "the simulator process died (signal SIGKILL)"),
]


def folder_with(path: Path, rows: list[dict[str, Any]], protocol: dict[str, Any] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    protocol = protocol or {
        "render_quality": "standard",
        "versions": {"mujoco": "3.2.3"},
        "center_crop": None,
    }
    (path / "summary.json").write_text(json.dumps(evaluation.summarise(rows, protocol=protocol)))
    return path


def test_the_number_comes_first_with_its_interval(tmp_path: Path) -> None:
    page = Reader(report.build(folder_with(tmp_path, ROWS)).read_text())
    assert not page.unclosed
    text = " ".join(page.texts[page.texts.index(tmp_path.name) :])
    assert text.index("70.0 %") < 60  # 14 of 20, before anything but the run's name
    assert "95 % interval 48.1 to 85.5 %" in text
    assert "14 of 20 episodes succeeded." in text
    assert "1 more ended in an error" in text


def test_per_task_table(tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", " ".join(Reader(report.build(folder_with(tmp_path, ROWS)).read_text()).texts))
    assert "9 / 10 = 90.0 % (59.6–98.2)" in text
    assert "5 / 10 = 50.0 % (23.7–76.3)" in text
    assert "0 / 0 = – % (0.0–100.0) + 1 error" in text


def test_every_video_failures_first_and_nothing_from_outside(tmp_path: Path) -> None:
    page = Reader(report.build(folder_with(tmp_path, ROWS)).read_text())
    sources = [unquote(video["src"] or "").removesuffix("#t=0.05") for video in page.videos]
    assert sorted(sources) == sorted(line["video"] for line in ROWS if line["video"])
    failed = ["--success=False--" in source for source in sources]
    assert failed == sorted(failed, reverse=True)
    assert failed.count(True) == 6
    assert all(video["preload"] == "metadata" and "controls" in video for video in page.videos)
    assert not [link for link in page.links if ":" in link or link.startswith("/")]
    assert "the simulator process died (signal SIGKILL)" in page.texts


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    page = report.build(folder_with(tmp_path, [row(0, 0, None, "<script>alert(1)</script>")])).read_text()
    assert "<script>" not in page
    assert "&lt;place&gt;" in page


def test_fast_rendering_is_named(tmp_path: Path) -> None:
    standard = report.build(folder_with(tmp_path, ROWS)).read_text()
    fast = report.build(folder_with(tmp_path, ROWS, {"render_quality": "fast"})).read_text()
    assert "not to be compared with published numbers" in fast
    assert "not to be compared with published numbers" not in standard


def test_an_episode_played_again_is_shown_once(tmp_path: Path) -> None:
    rows = [row(2, 0, None, "the simulator hung"), row(2, 0, True)]
    folder = folder_with(tmp_path, rows)
    (folder / "summary.json").write_text(json.dumps(evaluation.summarise(rows[1:], protocol={})))
    page = report.build(folder).read_text()
    assert "the simulator hung" not in page
    assert page.count("<video") == 1


def test_a_folder_without_an_evaluation_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no summary\.json"):
        report.build(tmp_path)


def test_a_run_without_episodes_yet(tmp_path: Path) -> None:
    assert "– %" in report.build(folder_with(tmp_path, [])).read_text()
