"""summary.py: what summary.json says beside the rates, the sentences of it, and the mean over several rollout folders."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from prismatic.episodes.result import EpisodeResult, ReplayResult
from prismatic.errors import ConfigError
from prismatic.summary import beside, mean_over_suites, sentences, summarise
from tests import drawn_results


def row(task: int, success: bool | None, **facts: Any) -> EpisodeResult:
    return drawn_results.row(task, 0, success, **facts)


def test_rates_of_tasks_leave_errors_out_and_have_an_interval_over_tasks() -> None:
    rows = [row(0, success) for success in (True, True, False, None)]
    summary = summarise(rows, protocol={})
    assert (summary["episodes"], summary["successes"], summary["failures"], summary["errors"]) == (4, 2, 1, 1)
    assert summary["success_rate"] == pytest.approx(2 / 3)
    assert summary["interval_95"] == pytest.approx([0.2077, 0.9385], abs=1e-4)
    assert summarise(rows[3:], protocol={})["success_rate"] is None
    rows = [row(task, task < 5) for task in range(10) for _ in range(20)]
    summary = summarise(rows, protocol={})
    assert [task["success_rate"] for task in summary["per_task"]] == [1.0] * 5 + [0.0] * 5
    assert summary["per_task"][0]["interval_95"] == pytest.approx([0.8389, 1.0], abs=1e-4)  # Wilson, 20 of 20
    assert summary["interval_95"] == pytest.approx([0.4313, 0.5687], abs=1e-4)
    assert summary["interval_95_by_task"] == [0.2, 0.8]  # the tasks differ, not their episodes
    assert any(line.startswith("20.0 to 80.0 % when whole tasks are drawn") for line in sentences(summary))
    assert summarise(rows[:20], protocol={})["interval_95_by_task"] is None  # one task has no spread
    assert summary["episodes_needed"] is None  # nobody asked
    needs = summarise(rows, protocol={"difference_asked": 0.1})
    assert needs["episodes_needed"]["separate_runs"] == 388
    assert needs["episodes_needed"]["sentence"] in sentences(needs)


def test_it_says_what_the_env_seed_varied() -> None:
    moved = {"cabinet": 12.3, "stove": 4.0, "bowl": 1.0, "plate": 0.6}
    rows = [row(0, True, moved_by_env_seed_mm=moved), row(3, True, moved_by_env_seed_mm={})]
    summary = summarise(rows, protocol={"env_seed": 5})
    assert summary["moved_by_env_seed_mm"] == {"0": moved, "3": {}}
    line = "env_seed 5 moved, against seed 0: task 0 cabinet 12 mm, stove 4 mm, bowl 1 mm and 1 more; task 3 nothing"
    assert line in sentences(summary)
    assert summarise([row(0, True)], protocol={})["moved_by_env_seed_mm"] is None


def test_replays_and_controls_are_told() -> None:
    whole, left = (ReplayResult(file_path="f", recorded_steps=40, followed_steps=steps) for steps in (40, 7))
    rows = [row(0, True, replay=whole), row(0, False, replay=left), row(0, None, replay=left)]
    controls = {"zero": {"successes": 1, "judged": 4, "interval_95": [0.0456, 0.6994]}}
    metrics = {"action_accuracy": 0.5, "l1_loss": 0.25}
    splits = {
        "train": {"frames": 9, "policy": metrics, "teacher_forced": metrics},
        "validation": {"frames": 8, "policy": {"l1_loss": 0.5}, "teacher_forced": {"l1_loss": 0.5}},
    }
    summary = summarise(rows, protocol={"open_loop": {"splits": splits}}, controls=controls)
    assert summary["replay"] == {"started_as_recorded": 2, "followed_to_the_end": 1, "left_out": 0}
    text = "\n".join(sentences(summary))
    assert "2 began as recorded, 1 of them followed" in text
    assert "control zero: 1 of 4 episodes on these tasks, 95 % interval 4.6 to 69.9 %" in text
    assert "control open loop, 9 train frames: action accuracy 0.500, L1 0.250" in text
    assert "8 validation frames: L1 0.500 (teacher-forced L1 0.500)" in text  # a regression has no tokens


# --- runs beside it ------------------------------------------------------------------------------------------


def write_run(folder: Path, successes: int, failures: int, **identity: Any) -> dict[str, Any]:
    folder.mkdir(parents=True)
    whole = {"task_suite_name": "s", "env_seed": 0, "num_steps_wait": 10, "step_limit": 220} | identity
    outcomes = [True] * successes + [False] * failures + [None]  # the same in both tasks
    rows = [drawn_results.row(task, number, outcome) for task in (0, 1) for number, outcome in enumerate(outcomes)]
    (folder / "results.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in rows))
    (folder / "run.json").write_text(json.dumps({"identity": whole, "record": {}}))
    return whole


def test_controls_of_the_same_episodes_stand_beside(tmp_path: Path) -> None:
    own = write_run(tmp_path / "own", 5, 5, policy="checkpoint", weights="w")
    zero = write_run(tmp_path / "zero", 0, 4, policy="zero")
    write_run(tmp_path / "random-few", 1, 1, policy="random", seed=1)
    write_run(tmp_path / "random-many", 1, 9, policy="random", seed=2)
    write_run(tmp_path / "expert-elsewhere", 9, 0, policy="expert", env_seed=1)
    write_run(tmp_path / "expert-of-other-physics", 9, 0, policy="expert", mujoco="3.17")
    write_run(tmp_path / "swap", 4, 6, policy="checkpoint", weights="w", instruction="swap")
    write_run(tmp_path / "swap-other", 0, 99, policy="checkpoint", weights="other", instruction="swap")
    write_run(tmp_path / "twin", 9, 1, policy="checkpoint", weights="w", note="x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    found = beside(tmp_path / "own", own, task_ids={1})
    assert {name: (result["successes"], result["judged"], result["folder"]) for name, result in found.items()} == {
        "zero": (0, 4, "zero"),
        "random": (1, 10, "random-many"),
        "instruction swap": (4, 10, "swap"),
    }
    later = own | {"benchmark_files": "0123"}  # a run of today beside controls of before that was recorded
    assert beside(tmp_path / "own", later, task_ids={1}) == found
    assert found["zero"]["interval_95"] == pytest.approx([0.0, 0.4899], abs=1e-4)
    assert beside(tmp_path / "own", own, task_ids={7}) == {}
    assert "zero" not in beside(tmp_path / "zero", zero, task_ids={0})


# --- the number that papers give --------------------------------------------------------------------------------------


def write(folder: Path, suite: str, tasks: dict[int, list[bool | None]]) -> Path:
    rows = [
        drawn_results.row(task, number, success, suite=suite)
        for task, outcomes in tasks.items()
        for number, success in enumerate(outcomes)
    ]
    return drawn_results.folder_with(folder, rows)


def test_each_suite_and_their_mean(tmp_path: Path) -> None:
    one = write(tmp_path / "a", "one", {0: [True] * 40, 1: [True] * 40 + [None]})
    two = write(tmp_path / "b", "two", {0: [False] * 10, 1: [True] * 10})
    assert list(mean_over_suites([one, two])) == [
        "one: 100.0 %, 95 % interval 95.4 to 100.0 % (80 of 80 episodes, 2 tasks)",
        "two: 50.0 %, 95 % interval 29.9 to 70.1 % (10 of 20 episodes, 2 tasks)",
        "mean over 2 suites: 75.0 %, 95 % interval 50.0 to 100.0 % (bootstrap of whole tasks)",
    ]
    *_, alone = mean_over_suites([write(tmp_path / "c", "three", {0: [True, False]})])
    assert alone.startswith("mean over 1 suites: 50.0 %, no interval")


def test_what_cannot_be_averaged(tmp_path: Path) -> None:
    one, twice = (write(tmp_path / name, "one", {0: [True]}) for name in ("a", "b"))
    with pytest.raises(ConfigError, match=r"one/task0/state0/seed0 stands in .*a and in .*b"):
        list(mean_over_suites([one, twice]))
    for empty in (tmp_path / "nothing", write(tmp_path / "c", "two", {0: [None]})):
        with pytest.raises(ConfigError, match=r"has no episode in its results\.jsonl"):
            list(mean_over_suites([one, empty]))


def test_a_stage_of_a_later_version_comes_last() -> None:
    summary = summarise([row(0, False, stages={"foo": 3, "touched": 2})], protocol={})
    assert [*summary["funnel"]] == ["touched", "foo"]


def test_a_mean_over_runs_of_several_protocols_says_so(tmp_path: Path) -> None:
    for number, quality in enumerate(("fast", "standard")):
        folder = tmp_path / quality
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"identity": {"render_quality": quality}, "record": {}}))
        (folder / "results.jsonl").write_bytes(msgspec.json.encode(row(number, True)) + b"\n")
    (beware,) = [line for line in mean_over_suites([tmp_path / "fast", tmp_path / "standard"]) if "beware" in line]
    assert "render_quality" in beware and "fast in" in beware and "standard in" in beware
