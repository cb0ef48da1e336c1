"""session.py: answers in batches or one by one, an error of the policy goes to its own episode; what a call measured of itself."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from prismatic import machine
from prismatic.episodes import session as module
from prismatic.episodes.player import Observation, Outcome
from prismatic.episodes.pool import Question
from prismatic.episodes.session import Session
from prismatic.episodes.trials import Trial
from prismatic.errors import PolicyError
from tests.fake_policies import BrightnessPolicy

LEVELS = (0, 100, 255)


def trial(state: int = 0) -> Trial:
    return Trial(suite="fake", task_id=0, init_state=state, env_seed=0)


def questions(*levels: int) -> list[Question]:
    frames = [np.full((8, 8, 3), level, np.uint8) for level in levels]
    state = np.zeros(8, np.float32)
    return [Question(trial(row), 0, Observation(frame, "a", frame, state)) for row, frame in enumerate(frames)]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_each_question_gets_its_chunk_and_margin(one_by_one: bool) -> None:
    policy = BrightnessPolicy(num_images=2, num_actions_chunk=3, uses_state=True)
    answers = Session(policy, workers=3, one_by_one=one_by_one).answer(questions(*LEVELS))
    assert policy.batch_sizes == ([1, 1, 1] if one_by_one else [3])
    for level, (chunk, margin) in zip(LEVELS, answers, strict=True):
        assert chunk.shape == (3, 7) and margin == np.inf
        assert chunk[0, 0] == pytest.approx(0.5 + level / 510)


def test_an_error_of_the_policy_goes_to_its_own_episode() -> None:
    class Picky(BrightnessPolicy):
        def batch_chunks(self, frames: Any, *rest: Any, **named: Any) -> np.ndarray:
            if any(frame[0, 0, 0] == 100 for frame in frames):
                raise PolicyError("NaN")
            return super().batch_chunks(frames, *rest, **named)

    answers = Session(Picky(), workers=3).answer(questions(*LEVELS))
    assert [isinstance(answer, PolicyError) for answer in answers] == [False, True, False]


def test_latency_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.010, 1.0, 1.020, 2.0, 2.100])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    session = Session(BrightnessPolicy(), workers=2)
    for levels in ((0, 255), (0,), (0,)):
        session.answer(questions(*levels))
    latency = session.record()["policy_latency_ms"]
    assert latency == {"p50": 20.0, "p95": 92.0, "calls": 3, "rows_per_call": 1.33}


def test_memory_is_the_sum_of_what_lived_at_once() -> None:
    session = Session(None, workers=2, rank=3)
    for process, peak in ((1, 10), (1, 30), (2, 20), (3, 5)):  # 3 replaced one of the others
        session.note(Outcome(trial(), success=True, steps=1, seconds=1.0, process=process, peak_memory=peak))
    record = session.record()
    host = record["host_memory_peak_bytes"]
    assert host["workers"] == [30, 20]
    assert host["sum"] == host["parent"] + 50
    assert 10_000_000 < host["parent"] <= machine.peak_memory()
    assert (record["rank"], record["episodes"], record["workers"]) == (3, 4, 2)


def test_what_decoding_took() -> None:
    counts = Counter(actions=8, calls=4, passes=7, accepted=30)
    record = Session(BrightnessPolicy(), workers=1, counts=counts).record()
    assert record["decoding"] == {"passes_per_call": 1.75, "accepted_tokens": 3.75}


def test_nothing_measured_is_null() -> None:
    session = Session(None, workers=1)
    record = session.record()
    assert record["policy_latency_ms"] is None and record["gpu_memory_peak_bytes"] is None
    assert record["golden_frame"] is None and record["decoding"] is None
    session.hear("golden", {"sha256": "0123"})
    assert session.record()["golden_frame"] == {"sha256": "0123"}
