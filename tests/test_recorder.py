"""recorder.py: failures made on purpose in the real simulator get their verdicts. In a process of its own, without rendering.

A few of scripted_failures.py's; `python -m tests.scripted_failures` plays all.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from prismatic.scene.diagnosis import Diagnosis
from tests.scripted_failures import CASES, run

PLAYED = [case for case in CASES if case.stages is not None]


def play() -> list[Diagnosis]:
    return [found for _, found in run(PLAYED)]


@pytest.fixture(scope="module")
def accounts() -> list[Diagnosis]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(play).result()


@pytest.mark.parametrize("number", range(len(PLAYED)), ids=[case.name for case in PLAYED])
def test_a_failure_made_on_purpose_gets_its_verdict(accounts: list[Diagnosis], number: int) -> None:
    case, found = PLAYED[number], accounts[number]
    assert found.verdict == case.verdict
    assert case.words in found.reason
    reached = [step for step in found.stages.values() if step is not None]
    assert reached == sorted(reached)
    assert [name for name, step in found.stages.items() if step is not None] == [*(case.stages or ())]
