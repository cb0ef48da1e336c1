"""suite_mean.py: the number that papers give, over several rollout folders."""

from pathlib import Path

import pytest

from prismatic.errors import ConfigError
from prismatic.suite_mean import mean_over_suites
from tests.drawn_results import folder_with, row


def write(folder: Path, suite: str, tasks: dict[int, list[bool | None]]) -> Path:
    rows = [
        row(task, number, success, suite=suite)
        for task, outcomes in tasks.items()
        for number, success in enumerate(outcomes)
    ]
    return folder_with(folder, rows)


def test_each_suite_and_their_mean(tmp_path: Path) -> None:
    one = write(tmp_path / "a", "one", {0: [True] * 40, 1: [True] * 40 + [None]})
    two = write(tmp_path / "b", "two", {0: [False] * 10, 1: [True] * 10})
    lines = mean_over_suites([one, two])
    assert lines[0].startswith("one: 100.0 %, 95 % interval 95.4 to 100.0 % (80 of 80 episodes, 2 tasks)")
    assert lines[1].startswith("two: 50.0 %, 95 % interval 29.9 to 70.1 %")
    assert lines[2] == "mean over 2 suites: 75.0 %, 95 % interval 50.0 to 100.0 % (bootstrap of whole tasks)"
    alone = mean_over_suites([write(tmp_path / "c", "three", {0: [True, False]})])
    assert alone[-1].startswith("mean over 1 suites: 50.0 %, no interval")


def test_what_cannot_be_averaged(tmp_path: Path) -> None:
    one = write(tmp_path / "a", "one", {0: [True]})
    twice = write(tmp_path / "b", "one", {0: [True]})
    with pytest.raises(ConfigError, match=r"one/task0/state0/seed0 stands in .*a and in .*b"):
        mean_over_suites([one, twice])
    with pytest.raises(ConfigError, match=r"nothing has no episode in its results\.jsonl"):
        mean_over_suites([one, tmp_path / "nothing"])
    errors = write(tmp_path / "c", "two", {0: [None]})
    with pytest.raises(ConfigError, match="has no episode"):
        mean_over_suites([errors])
