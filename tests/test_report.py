"""report.py on a folder as eval.py leaves it."""

import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from prismatic import evaluation, report
from prismatic.episodes.result import save_actions
from prismatic.errors import ConfigError
from tests.drawn_results import Reader, folder_with, row

ROWS = [
    *(row(0, state, True) for state in range(9)),
    row(0, 9, False),
    *(row(1, state, state % 2 == 0) for state in range(10)),
    row(2, 0, None, "the simulator process died (signal SIGKILL)"),
]


def text_of(folder: Path) -> str:
    return re.sub(r"\s+", " ", " ".join(Reader(report.build(folder).read_text()).texts))


def test_the_number_comes_first_with_its_interval_then_the_tasks(tmp_path: Path) -> None:
    page = Reader(report.build(folder_with(tmp_path, ROWS)).read_text())
    assert not page.unclosed
    text = re.sub(r"\s+", " ", " ".join(page.texts[page.texts.index(tmp_path.name) :]))
    assert text.index("70.0 %") < 60  # 14 of 20, before anything but the run's name
    for said in (
        "95 % interval 48.1 to 85.5 %", "14 of 20 episodes succeeded.", "1 more ended in an error",
        "9 / 10 = 90.0 % (59.6–98.2)", "5 / 10 = 50.0 % (23.7–76.3)", "0 / 0 = – % (0.0–100.0) + 1 error",
    ):  # fmt: skip
        assert said in text, said
    assert "– %" in report.build(folder_with(tmp_path / "new", [])).read_text()  # without episodes yet
    with pytest.raises(ConfigError, match=r"has no summary\.json"):
        report.build(tmp_path / "elsewhere")


def test_every_video_failures_first_and_nothing_from_outside(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, ROWS)
    poster = folder / evaluation.poster_name(str(ROWS[1].video))
    poster.parent.mkdir()
    poster.write_bytes(b"jpeg")
    page = Reader(report.build(folder).read_text())
    sources = [unquote(video["src"] or "") for video in page.videos]
    assert sorted(sources) == sorted(line.video for line in ROWS if line.video)
    failed = ["--success=False--" in source for source in sources]
    assert failed == sorted(failed, reverse=True)
    assert failed.count(True) == 6
    assert all(video["preload"] == "none" and "controls" in video for video in page.videos)
    assert [folder / unquote(str(video["poster"])) for video in page.videos if video.get("poster")] == [poster]
    assert not [link for link in page.links if ":" in link or link.startswith("/")]
    assert "the simulator process died (signal SIGKILL)" in page.texts


STAGES = ("approached", "touched", "grasped", "predicate_held")


def explained(path: Path) -> Path:
    """A run with stages, verdicts, reasons and actions, and what summary.json makes of them."""
    path.mkdir()
    rows = [row(0, 0, True), row(0, 1, False), row(1, 0, False), row(1, 1, None, "died")]
    for line, steps in zip(rows[:3], ((3, 5, 9, 20), (4, None, None, None), (2, 6, None, None)), strict=True):
        line.stages = dict(zip(STAGES, steps, strict=True))
        line.actions = save_actions(path, line.episode_id, np.linspace(-1, 1, 140).reshape(20, 7))
    for line, verdict in zip(rows, ("success", "never_touched", "closed_beside", "error"), strict=True):
        line.verdict, line.reason = verdict, f"Because of {verdict} & <b>more</b>."
    return folder_with(path, rows)


def test_failures_say_why_and_how_far_they_came_beside_their_actions(tmp_path: Path) -> None:
    page = report.build(explained(tmp_path / "run")).read_text()
    text = text_of(tmp_path / "run")
    assert "closed beside 1 of 2 failures" in text and "touched 2 of 3 episodes" in text
    assert "Because of never_touched & <b>more</b>." in text and "<b>more</b>" not in page
    assert "Because of success" not in text and "Because of error" not in text
    assert page.count('data-verdict="closed_beside"') == 1
    assert '<option value="closed_beside">closed beside (1)</option>' in page
    assert "<title>touched: step 6</title>" in page
    assert page.count('data-steps="20"') == page.count('class="gripper"') == 3  # an error has none
    (tmp_path / "run" / "actions" / "libero_spatial-task0-state1-seed0.npz").write_bytes(b"")
    assert report.build(tmp_path / "run").read_text().count('data-steps="20"') == 2


def test_of_many_successes_some_of_each_task_are_shown(tmp_path: Path) -> None:
    rows = [row(task, state, True) for task in (0, 1) for state in range(30)] + [
        row(1, 30 + n, False) for n in range(15)
    ]
    page = report.build(folder_with(tmp_path, rows)).read_text()
    assert page.count("<video") == 2 * report.SUCCESSES_A_TASK + 15
    assert "of 60, the first of each task" in page


def test_what_forbids_a_comparison_is_said(tmp_path: Path) -> None:
    golden = {"sha256": "aa", "differs_by": 36.0, "at_most": 0.5, "as_expected": False}
    session = {
        **{"started": "2026-01-02T03:04:05+00:00", "rank": 0, "episodes": 3, "workers": 2, "seconds": 5.0},
        "policy_latency_ms": {"p50": 61.2, "p95": 80.9, "calls": 9, "rows_per_call": 1.5},
        "decoding": {"passes_per_call": 1.7, "confirmed_words": 4.1, "doubtful_rows": 0},
        "host_memory_peak_bytes": {"parent": 10**9, "workers": [2 * 10**9] * 2, "sum": 5 * 10**9},
        "gpu_memory_peak_bytes": {"allocated": 14 * 10**9, "reserved": 15 * 10**9, "device": 17 * 10**9},
        "git_commit": "0123456789abcdef",
    }
    protocol = {
        "render_quality": "fast",
        "unpinned_simulator": ["mujoco 3.17.0, pinned 3.2.3"],
        "sessions": [session | {"golden_frame": golden}, session | {"golden_frame": golden | {"sha256": "bb"}}],
        "something_new": "kept",
    }
    page = report.build(folder_with(tmp_path, ROWS, protocol)).read_text()
    for fact in (
        "not to be compared with published numbers",
        "mujoco 3.17.0, pinned 3.2.3: another simulator",
        "the golden frame differs by 36.0 of 255",
        "drew different golden frames",
        "61 / 81 ms", "<td>1.7</td>", "5.0 GB (policy 1.0)", "17.0 GB (policy 15.0)", "aa, 36.000", "0123456789", "2026-01-02 03:04:05 UTC",
        "something_new", "kept",
    ):  # fmt: skip
        assert fact in page, fact
    assert "not to be compared" not in report.build(folder_with(tmp_path, ROWS)).read_text()


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \" ' {{ 7 * 7 }} \u2028 \ud800"
WRITTEN = HOSTILE.replace("\ud800", "?")  # a line of results.jsonl is UTF-8


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    folder = explained(tmp_path / "run")
    rows = evaluation.read_rows(folder)
    for line in rows:
        line.instruction = line.reason = line.verdict = WRITTEN
        line.stages = {f"{WRITTEN}: touched": 3}
        line.error = line.error and WRITTEN
    folder_with(folder, rows, {"command": HOSTILE, "policy_card": {HOSTILE: HOSTILE}, "render_quality": HOSTILE})
    page = report.build(folder).read_text(encoding="utf-8")
    assert page.count("<script>") == page.count("</script>") == 1 and "<img" not in page
    assert "{{ 7 * 7 }}" in page and " 49 " not in page
    read = Reader(page)
    assert not read.unclosed and WRITTEN in read.texts


def test_what_stands_beside_the_score_and_what_a_policy_was_told(tmp_path: Path) -> None:
    moved = {"stove": 4.0}
    rows = [
        row(0, n, True, instruction_given=told, moved_by_env_seed_mm=moved) for n, told in enumerate(("", "grab it"))
    ]
    text = text_of(folder_with(tmp_path, rows))
    assert "env_seed" in text and "moved, against seed 0: task 0 stove 4 mm" in text
    assert "given: nothing" in text and "given: grab it" in text
    assert "given:" not in text_of(folder_with(tmp_path / "plain", ROWS))
