"""bench/eval.py: what its rows hold, with the fake simulator; never how long anything took."""

import os
from pathlib import Path

import numpy as np
import pytest

from prismatic.bench import eval as bench_eval
from prismatic.episodes.player import Play
from prismatic.episodes.trials import Trial
from tests.fake_policies import BrightnessPolicy
from tests.fake_simulator import FakeBenchmark

TRIALS = [Trial(suite="fake", task_id=0, init_state=state, env_seed=0) for state in range(4)]


def test_a_row_counts_what_was_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("LP_NUM_THREADS", "5")
    setup = Play(benchmark=FakeBenchmark(), max_steps=6)
    row = bench_eval.measure(TRIALS, setup, BrightnessPolicy(), rendering=bench_eval.ONE_CORE, workers=2)
    assert (row["workers"], row["episodes"], row["steps"]) == (2, 4, 24)
    assert row["episodes an hour"] == pytest.approx(3600 * 4 / row["seconds"], rel=0.2)
    assert 0 < row["policy busy"] <= 1 and 0 < row["simulator busy"] <= 1
    assert 1 <= row["mean batch"] <= 2
    bench_eval.measure(TRIALS[:1], setup, BrightnessPolicy(), rendering=bench_eval.THREADED, workers=1)
    threads = [line.split("LP_NUM_THREADS=")[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert threads == ["0", "0", str(bench_eval.machine.available_cores())]
    assert os.environ["LP_NUM_THREADS"] == "5"


def test_the_policy_is_busy_while_it_computes_and_the_simulator_while_it_does_not_wait() -> None:
    class Slow(BrightnessPolicy):
        def batch_chunks(self, *observations: object, **named: object) -> np.ndarray:
            end = bench_eval.time.perf_counter() + 0.05
            while bench_eval.time.perf_counter() < end:
                pass
            return super().batch_chunks(*observations, **named)  # type: ignore[arg-type]

    setup = Play(benchmark=FakeBenchmark(), max_steps=6)
    row = bench_eval.measure(TRIALS[:2], setup, Slow(), rendering=bench_eval.ONE_CORE, workers=1)
    assert row["policy busy"] > 0.5 > row["simulator busy"]  # the fake takes no time
