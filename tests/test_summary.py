"""summary.py: what summary.json says beside the rates, and the sentences of it."""

from typing import Any

import pytest

from prismatic.episodes.result import EpisodeResult, ReplayResult
from prismatic.summary import sentences, summarise
from tests import drawn_results


def row(task: int, success: bool | None, **facts: Any) -> EpisodeResult:
    return drawn_results.row(task, 0, success, **facts)


def test_rates_of_tasks_and_the_interval_over_tasks() -> None:
    rows = [row(task, task < 5) for task in range(10) for _ in range(20)]
    summary = summarise(rows, protocol={})
    assert [task["success_rate"] for task in summary["per_task"]] == [1.0] * 5 + [0.0] * 5
    assert summary["per_task"][0]["interval_95"] == pytest.approx([0.8389, 1.0], abs=1e-4)  # Wilson, 20 of 20
    assert summary["interval_95"] == pytest.approx([0.4313, 0.5687], abs=1e-4)
    assert summary["interval_95_by_task"] == [0.2, 0.8]  # the tasks differ, not their episodes
    assert any(line.startswith("20.0 to 80.0 % when whole tasks are drawn") for line in sentences(summary))
    assert summarise(rows[:20], protocol={})["interval_95_by_task"] is None  # one task has no spread


def test_episodes_needed_for_the_difference_asked() -> None:
    rows = [row(0, number < 15) for number in range(20)]
    summary = summarise(rows, protocol={"difference_asked": 0.25})
    assert (
        summary["episodes_needed"]["separate_runs"] == 58
    )  # R: power.prop.test(p1 = .75, p2 = .5, power = .8), n = 57.7
    assert any("a difference of 25 points from 75.0 % shows in 58 episodes" in line for line in sentences(summary))
    assert summarise(rows, protocol={})["episodes_needed"] is None
    assert summarise([row(0, None)], protocol={"difference_asked": 0.25})["episodes_needed"] is None


def test_near_ties_are_counted() -> None:
    rows = [row(0, True, near_ties=[3, 4]), row(0, False, near_ties=[]), row(0, True)]
    summary = summarise(rows, protocol={})
    assert summary["near_ties"] == {"steps": 2, "episodes": 1}
    assert any("at 2 steps of 1 episodes" in line for line in sentences(summary))
    assert not any("near ties" in line for line in sentences(summarise(rows[1:], protocol={})))


def test_it_says_what_the_env_seed_varied() -> None:
    moved = {"cabinet": 12.3, "stove": 4.0, "bowl": 1.0, "plate": 0.6}
    rows = [row(0, True, moved_by_env_seed_mm=moved), row(3, True, moved_by_env_seed_mm={})]
    summary = summarise(rows, protocol={"env_seed": 5})
    assert summary["moved_by_env_seed_mm"] == {"0": moved, "3": {}}
    (line,) = [line for line in sentences(summary) if line.startswith("env_seed")]
    assert line == (
        "env_seed 5 moved, against seed 0: task 0 cabinet 12 mm, stove 4 mm, bowl 1 mm and 1 more; task 3 nothing"
    )
    assert summarise([row(0, True)], protocol={})["moved_by_env_seed_mm"] is None


def test_replays_and_controls_are_told() -> None:
    whole, left = (ReplayResult(file_path="f", recorded_steps=40, followed_steps=steps) for steps in (40, 7))
    rows = [row(0, True, replay=whole), row(0, False, replay=left), row(0, None, replay=left)]
    controls = {"zero": {"successes": 1, "judged": 4, "interval_95": [0.0456, 0.6994]}}
    metrics = {"action_accuracy": 0.5, "l1_loss": 0.25}
    split = {"frames": 9, "policy": metrics, "teacher_forced": metrics, "same_first_id": 1.0}
    summary = summarise(rows, protocol={"open_loop": {"splits": {"train": split}}}, controls=controls)
    assert summary["replay"] == {"started_as_recorded": 2, "followed_to_the_end": 1, "left_out": 0}
    text = "\n".join(sentences(summary))
    assert "2 began as recorded, 1 of them followed" in text
    assert "control zero: 1 of 4 episodes on these tasks, 95 % interval 4.6 to 69.9 %" in text
    assert "control open loop, 9 train frames: action accuracy 0.500, L1 0.250" in text
