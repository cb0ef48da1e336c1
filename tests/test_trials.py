"""trials.py: which episodes a run consists of."""

from typing import Any

import pytest

from prismatic.episodes.trials import list_trials
from prismatic.errors import ConfigError
from tests.fake_simulator import FakeBenchmark


def test_plan_names_every_episode_by_what_it_is() -> None:
    trials = list_trials(FakeBenchmark(), "fake", task_ids=(2, 0), num_trials=2, first_init_state=3, env_seed=5)
    assert [trial.id for trial in trials] == [
        f"fake/task{task}/state{state}/seed5" for task in (0, 2) for state in (3, 4)
    ]
    assert len(list_trials(FakeBenchmark(), "fake", num_trials=8)) == 24  # no task named: all


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"num_trials": 9}, r"8 stored initial states.*num_trials_per_task 9"),
        ({"num_trials": 2, "first_init_state": 7}, "from first_init_state 7 on asks for more"),
        ({"num_trials": 1, "task_ids": (9,)}, "no task 9"),
        ({"suite": "real"}, "unknown suite 'real'"),
    ],
)
def test_plan_refuses_what_is_not_there(asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        list_trials(FakeBenchmark(), **(dict[str, Any](suite="fake") | asked))
