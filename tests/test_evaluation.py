"""evaluation.py, player.py and pool.py with real processes and a fake simulator."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from prismatic import evaluation
from prismatic.episodes.player import Play
from prismatic.episodes.result import load_actions, read_rows
from prismatic.episodes.trials import Trial, list_trials
from prismatic.errors import ConfigError
from tests import drawn_results
from tests.fake_policies import BrightnessPolicy
from tests.fake_simulator import FakeBenchmark

FAKE = FakeBenchmark()
TESTS = Path(__file__).parent


def plan(num_trials: int = 4, task_ids: tuple[int, ...] = (0, 1)) -> list[Trial]:
    return list_trials(FAKE, "fake", task_ids=task_ids, num_trials=num_trials)


@contextlib.contextmanager
def opened(path: Path, identity: dict[str, Any] | None = None) -> Iterator[evaluation.RolloutFolder]:
    with evaluation.RolloutFolder(path, identity=identity or {"policy": "x"}, record={"command": "test"}) as folder:
        yield folder


def evaluate(path: Path, trials: list[Trial], **options: Any) -> dict[str, Any]:
    play = options.pop("play", Play(benchmark=FAKE))
    load = options.pop("load_policy", lambda: evaluation.Loaded(BrightnessPolicy()))
    with opened(path, options.pop("identity", None)) as folder:
        return evaluation.evaluate(
            trials, folder, play=play, load_policy=load if play.policy == "parent" else None, **options
        )


def behaviour(path: Path) -> list[tuple[Any, ...]]:
    names = ("episode_id", "success", "steps", "actions_sha256")
    return sorted(tuple(getattr(row, name) for name in names) for row in read_rows(path))


# --- stopping and going on ------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The behaviour of an evaluation that nothing stopped: four trials of each of three tasks."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate(folder, plan(4, (0, 1, 2)), num_workers=2)
    return behaviour(folder)


def test_continues_where_it_stopped_and_drops_a_torn_line(tmp_path: Path, whole: list[tuple[Any, ...]]) -> None:
    parts = tmp_path / "parts"
    evaluate(parts, plan(2))
    results = parts / "results.jsonl"
    first, kept = results.read_bytes(), {path: path.read_bytes() for path in (parts / "actions").iterdir()}
    results.write_bytes(first[:-1])  # as an editor saves it: nothing is lost
    assert len(read_rows(parts)) == 4
    evaluate(parts, plan(2))
    assert results.read_bytes() == first
    for joined in (
        first.replace(b"\n", b" "),
        b"[" + first[:-1].replace(b"\n", b",") + b"]",
        first.replace(b"\n", b"\r"),
    ):
        results.write_bytes(joined)
        with pytest.raises(ConfigError, match="several rows in its last line"):
            evaluate(parts, plan(2))
        assert results.read_bytes() == joined  # nothing is lost
    results.write_bytes(first + b'{"episode_id": "fake/task0/state2/seed0", "succ')
    assert len(read_rows(parts)) == 4
    evaluate(parts, plan())
    assert [row.init_state for row in read_rows(parts)[4:]] == [2, 3, 2, 3]  # and none of those that were there
    assert results.read_bytes().startswith(first)
    assert behaviour(parts) == whole[:8]
    rows = read_rows(parts)
    assert len(results.read_text().splitlines()) == len(rows) == 8
    for row in rows:
        acted = load_actions(parts, row.actions)
        assert acted is not None and acted.shape == (row.steps, 7)
        assert hashlib.sha256(acted.tobytes()).hexdigest()[:16] == row.actions_sha256
    assert len(kept) == 4 and all(path.read_bytes() == content for path, content in kept.items())
    # Nothing left to do: the policy is not even loaded.
    summary = evaluate(parts, plan(), load_policy=lambda: pytest.fail())
    assert summary["episodes"] == 8
    assert summary["protocol"]["policy_card"] == {"decode": "brightness"}
    assert [session["episodes"] for session in summary["protocol"]["sessions"]] == [4, 4]  # a call each


def test_an_error_is_recorded_and_played_again_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", str(tmp_path))
    (tmp_path / "1-2").write_text("raise 99")
    run = tmp_path / "run"
    summary = evaluate(run, plan())
    assert (summary["episodes"], summary["errors"]) == (8, 1)
    assert summary["success_rate"] == summary["successes"] / 7
    (row,) = [row for row in read_rows(run) if row.error]
    assert (row.episode_id, row.success, row.video) == ("fake/task1/state2/seed0", None, None)
    assert (row.error, row.verdict, row.stages) == ("ValueError: the physics exploded", "error", {})
    assert row.reason == "The episode crashed: ValueError: the physics exploded"
    (tmp_path / "1-2").unlink()
    assert evaluate(run, plan())["errors"] == 1  # not of itself
    summary = evaluate(run, plan(), retry_errors=True)  # the newer line counts
    assert (summary["episodes"], summary["errors"]) == (8, 0)


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    evaluate(tmp_path, plan(1))
    results = tmp_path / "results.jsonl"
    results.write_bytes(b"{broken\n" + results.read_bytes())
    with pytest.raises(ConfigError, match=r"results\.jsonl, line 1 is not valid JSON.*remove that line"):
        evaluate(tmp_path, plan(1))


def test_rows_of_an_older_version_are_read(tmp_path: Path) -> None:
    drawn_results.folder_with(tmp_path, [drawn_results.row(0, 0, True)])
    line = json.loads((tmp_path / "results.jsonl").read_text()) | {"near_ties": [3]}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    assert read_rows(tmp_path) == [drawn_results.row(0, 0, True)]


def test_a_policy_that_cannot_be_loaded_leaves_no_trace(tmp_path: Path) -> None:
    def fail() -> NoReturn:
        raise ConfigError("no weights")

    (tmp_path / "mine.txt").write_text("")
    for path in (tmp_path, tmp_path / "run"):
        with pytest.raises(ConfigError, match="no weights"):
            evaluate(path, plan(), load_policy=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_was_there_before_a_failure_stays(tmp_path: Path) -> None:
    with opened(tmp_path, {"policy": "x"}):
        (tmp_path / "summary.json").write_text("{}")  # as --open_loop leaves it, without an episode
    with pytest.raises(KeyboardInterrupt), opened(tmp_path, {"policy": "x"}):
        raise KeyboardInterrupt
    assert (tmp_path / "summary.json").exists() and (tmp_path / "run.json").exists()


def test_another_run_is_refused_the_folder(tmp_path: Path) -> None:
    with opened(tmp_path, {"policy": "mistyped"}):
        pass  # a run that never got anywhere leaves the folder to the next
    evaluate(tmp_path, plan(1), identity={"policy": "x", "env_seed": 0})
    known = {"policy": "x", "env_seed": 3}, {"policy": "x"}, {"policy": "x", "env_seed": 0}
    for identity, sentence in zip(known, ("env_seed 0, this one has 3", "env_seed 0, this one has None"), strict=False):
        with pytest.raises(ConfigError, match=f"holds a run with {sentence}: use another --run_id_note"):
            evaluation.RolloutFolder(tmp_path, identity=identity, record={})
    (tmp_path / "run.json").unlink()
    with pytest.raises(ConfigError, match="holds a run with policy None"):
        evaluation.RolloutFolder(tmp_path, identity=known[2], record={})


def test_two_processes_cannot_write_to_one_folder(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(ConfigError, match="another evaluation is writing"):
        evaluation.RolloutFolder(tmp_path, identity={"policy": "x"}, record={})
    with opened(tmp_path):
        pass  # free again
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*: make room, or give another --local_log_dir"):
        evaluation.RolloutFolder(tmp_path / "file" / "run", identity={}, record={})


KILLED = """
import sys, time
sys.path[:0] = [{repository!r}]

if __name__ == "__main__":  # the simulator processes, which import this once more, need no torch
    from pathlib import Path
    from prismatic import evaluation
    from prismatic.errors import exit_codes
    from prismatic.episodes.player import Play
    from prismatic.episodes.trials import list_trials
    from tests.fake_policies import BrightnessPolicy
    from tests.fake_simulator import FakeBenchmark

    with exit_codes():
        trials = list_trials(FakeBenchmark(), "fake", num_trials=4)
        path, slow = Path({folder!r}), BrightnessPolicy(check=lambda frames: time.sleep(0.05))
        with evaluation.RolloutFolder(path, identity={{"policy": "x"}}, record={{}}) as folder:
            evaluation.evaluate(trials, folder, play=Play(benchmark=FakeBenchmark(), video_folder=path),
                load_policy=lambda: evaluation.Loaded(slow), num_workers=2)
"""


def _is_alive(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_stopped_at_any_moment_it_loses_only_what_is_under_way(
    tmp_path: Path, stop: signal.Signals, code: int, whole: list[tuple[Any, ...]]
) -> None:
    script, run = tmp_path / "script.py", tmp_path / "run"
    script.write_text(KILLED.format(repository=str(TESTS.parent), folder=str(run)))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True, start_new_session=True)
    results = run / "results.jsonl"
    deadline = time.monotonic() + 300  # where other work fills the cores, it takes minutes
    while not (results.exists() and results.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)  # as a terminal does: to the workers as well
    else:
        process.send_signal(stop)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in errors, errors
    deadline = time.monotonic() + 60
    while any(_is_alive(int(child)) for child in children):
        assert time.monotonic() < deadline, "a simulator process outlives its parent"
        time.sleep(0.02)
    before = read_rows(run)
    assert 3 <= len(before) < 12
    if stop != signal.SIGKILL:
        assert json.loads((run / "summary.json").read_text())["episodes"] == len(before)
    evaluate(run, plan(4, (0, 1, 2)), play=Play(benchmark=FAKE, video_folder=run))
    assert read_rows(run)[: len(before)] == before
    assert behaviour(run) == whole
    assert len(list(run.glob("*.mp4"))) == 12
    assert not list(run.glob(".unfinished*"))


# --- what is written ------------------------------------------


def test_a_line_a_video_with_its_poster_and_a_summary(tmp_path: Path) -> None:
    import imageio.v3 as imageio

    play = Play(benchmark=FAKE, video_folder=tmp_path)
    summary = evaluate(tmp_path, plan(2), play=play, num_workers=2)
    row = next(row for row in read_rows(tmp_path) if row.episode_id == "fake/task1/state1/seed0")
    assert (row.suite, row.task_id, row.init_state, row.env_seed, row.error) == ("fake", 1, 1, 0, None)
    assert row.instruction == "push the point to the goal, 1." and row.seconds > 0
    assert row.video and row.video == f"episode=10--success={row.success}--task=push_the_point_to_the_goal__1_.mp4"
    assert (tmp_path / evaluation.poster_name(row.video)).is_file()
    assert len(list(tmp_path.rglob("*.jpg"))) == 4
    frames = imageio.imread(tmp_path / row.video)
    assert len(frames) == row.steps + 1  # what the policy saw, and how it ended
    assert abs(int(frames[0].mean()) - 17) <= 3
    assert frames[-1].mean() > frames[0].mean()
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert [task["task_id"] for task in summary["per_task"]] == [0, 1]
    protocol = dict(summary["protocol"])
    (session,) = protocol.pop("sessions")
    assert protocol == {"policy": "x", "command": "test", "policy_card": {"decode": "brightness"}}
    assert (session["episodes"], session["workers"], session["rank"]) == (4, 2, 0)
    asked = session["policy_latency_ms"]["calls"] * session["policy_latency_ms"]["rows_per_call"]
    assert asked == pytest.approx(sum(row.steps for row in read_rows(tmp_path)), rel=0.01)
    assert len(session["host_memory_peak_bytes"]["workers"]) == 2
    assert session["golden_frame"]["as_expected"] is False  # the fake simulator's is black


def test_each_line_says_how_far_it_got_and_why(tmp_path: Path) -> None:
    summary = evaluate(tmp_path, plan(8), play=Play(benchmark=FAKE, policy="random"))
    for row in read_rows(tmp_path):
        assert list(row.stages)[:2] == ["approached", "touched"] and row.stages["touched"] == 1
        assert (row.verdict == "success") == row.success
        assert row.success or row.verdict in ("beside_target", "never_grasped", "idle")
        assert row.stages["predicate_held"] == (row.steps if row.success else None)
        assert row.reason is not None and row.reason.endswith(".")
    assert sum(summary["verdicts"].values()) == 16
    reached = summary["funnel"]["predicate_held"]["reached"]
    assert summary["verdicts"].get("success", 0) == summary["successes"] == reached
    assert summary["funnel"]["touched"] == {"episodes": 16, "reached": 16, "share": 1.0}
    assert [task["funnel"]["touched"]["episodes"] for task in summary["per_task"]] == [8, 8]
