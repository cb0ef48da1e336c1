"""meter.py: what a call measured of itself, and nothing where there was nothing."""

from collections import Counter

import numpy as np
import pytest

from prismatic import machine
from prismatic.episodes import meter
from prismatic.episodes.meter import Meter
from prismatic.episodes.player import Outcome, Trial
from tests.fake_simulator import BrightnessPolicy


def outcome(process: int, peak: int) -> Outcome:
    trial = Trial(suite="fake", task_id=0, init_state=0, env_seed=0)
    return Outcome(trial=trial, success=True, steps=1, seconds=1.0, process=process, peak_memory=peak)


def test_latency_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.010, 1.0, 1.020, 2.0, 2.100])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(times))
    policy = BrightnessPolicy()
    measured = Meter(policy, workers=2)
    frames = [np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)]
    assert measured.batch(frames, ["a", "b"]).tolist() == policy.batch(frames, ["a", "b"]).tolist()
    measured.batch(frames[:1], ["a"])
    measured.batch(frames[:1], ["a"])
    latency = measured.session()["policy_latency_ms"]
    assert latency == {"p50": 20.0, "p95": 92.0, "calls": 3, "rows_per_call": 1.33}
    assert measured.batch_sizes == policy.batch_sizes  # what else it is asked, the policy answers


def test_memory_is_the_sum_of_what_lived_at_once() -> None:
    measured = Meter(None, workers=2, rank=3)
    for process, peak in ((1, 10), (1, 30), (2, 20), (3, 5)):  # 3 replaced one of the others
        measured.hear(outcome(process, peak))
    session = measured.session()
    host = session["host_memory_peak_bytes"]
    assert host["workers"] == [30, 20]
    assert host["sum"] == host["parent"] + 50
    assert 10_000_000 < host["parent"] <= machine.peak_memory()
    assert (session["rank"], session["episodes"], session["workers"]) == (3, 4, 2)


def test_what_decoding_took_and_whose_frames_they_are() -> None:
    class Drafting:
        def __init__(self) -> None:
            self.counts = Counter(actions=8, calls=4, passes=7, confirmed=30, doubtful=1)
            self.asked: list[object] = []

        def batch(self, frames: object, instructions: object, wrists: object = None, *, episodes: object) -> np.ndarray:
            self.asked.append(episodes)
            return np.zeros((1, 7))

    policy = Drafting()
    measured = Meter(policy, workers=1)
    measured.batch([np.zeros((8, 8, 3), np.uint8)], ["a"], episodes=["first"])
    assert policy.asked == [["first"]]
    assert measured.session()["decoding"] == {"passes_per_call": 1.75, "confirmed_words": 3.75, "doubtful_rows": 1}


def test_nothing_measured_is_null() -> None:
    session = Meter(None, workers=1).session()
    assert session["policy_latency_ms"] is None
    assert session["gpu_memory_peak_bytes"] is None
    assert session["golden_frame"] is None and session["decoding"] is None
    measured = Meter(None, workers=1)
    measured.see({"sha256": "0123"})
    assert measured.session()["golden_frame"] == {"sha256": "0123"}
