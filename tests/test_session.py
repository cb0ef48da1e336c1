"""session.py: answers in batches or one by one, an error of the policy goes to its own episode; what a call measured of itself."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from prismatic import machine
from prismatic.episodes import session as module
from prismatic.episodes.player import Outcome
from prismatic.episodes.session import Session
from prismatic.errors import PolicyError
from prismatic.observation import Observation
from tests.drawn_results import row
from tests.fake_policies import BrightnessPolicy

LEVELS = (0, 100, 255)


def questions(*levels: int) -> list[tuple[str, Observation]]:
    frames = [np.full((8, 8, 3), level, np.uint8) for level in levels]
    return [("job", Observation(frame, "a", frame, np.zeros(8, np.float32))) for frame in frames]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_each_question_gets_its_chunk(one_by_one: bool) -> None:
    policy = BrightnessPolicy(num_images=2, num_actions_chunk=3, uses_state=True)
    answers = Session(policy, workers=3, one_by_one=one_by_one).answer(questions(*LEVELS))
    assert policy.batch_sizes == ([1, 1, 1] if one_by_one else [3])
    assert [chunk.shape for chunk in answers] == [(3, 7)] * 3
    assert [chunk[0, 0] for chunk in answers] == pytest.approx([0.5 + level / 510 for level in LEVELS])


def test_an_error_of_the_policy_goes_to_its_own_episode() -> None:
    def picky(frames: Any) -> None:
        if any(frame[0, 0, 0] == 100 for frame in frames):
            raise PolicyError("NaN")

    answers = Session(BrightnessPolicy(check=picky), workers=3).answer(questions(*LEVELS))
    assert [isinstance(answer, PolicyError) for answer in answers] == [False, True, False]


def test_what_a_call_measured_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.010, 1.0, 1.020, 2.0, 2.100])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    counts = Counter(actions=8, calls=4, passes=7, accepted=30)
    session = Session(BrightnessPolicy(), workers=2, rank=3, counts=counts)
    for levels in ((0, 255), (0,), (0,)):
        session.answer(questions(*levels))
    for process, peak in ((1, 10), (1, 30), (2, 20), (3, 5)):  # 3 replaced one of the others
        session.note(Outcome(row(0, 0, True), process=process, peak_memory=peak))
    session.hear("golden", {"sha256": "0123"})
    record = session.record()
    assert record["policy_latency_ms"] == {"p50": 20.0, "p95": 92.0, "calls": 3, "rows_per_call": 1.33}
    assert record["decoding"] == {"passes_per_call": 1.75, "accepted_tokens": 3.75}
    host = record["host_memory_peak_bytes"]
    assert host["workers"] == [30, 20] and host["sum"] == host["parent"] + 50  # what lived at once
    assert 10_000_000 < host["parent"] <= machine.peak_memory()
    assert (record["rank"], record["episodes"], record["workers"]) == (3, 4, 2)
    assert record["golden_frame"] == {"sha256": "0123"}
    nothing = Session(None, workers=1).record()
    assert not any(nothing[name] for name in ("policy_latency_ms", "gpu_memory_peak_bytes", "golden_frame", "decoding"))
