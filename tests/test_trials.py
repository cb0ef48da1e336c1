"""trials.py: which episodes a run consists of."""

import pytest

from prismatic.episodes.trials import list_trials
from prismatic.errors import ConfigError
from tests.fake_simulator import FakeBenchmark

FAKE = FakeBenchmark()


def test_plan_names_every_episode_by_what_it_is() -> None:
    trials = list_trials(FAKE, "fake", task_ids=(2, 0), num_trials=2, first_init_state=3, env_seed=5)
    assert [trial.id for trial in trials] == [
        "fake/task0/state3/seed5",
        "fake/task0/state4/seed5",
        "fake/task2/state3/seed5",
        "fake/task2/state4/seed5",
    ]
    assert len(list_trials(FAKE, "fake", num_trials=8)) == 24  # no task named: all


def test_plan_refuses_what_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"8 stored initial states.*num_trials_per_task 9"):
        list_trials(FAKE, "fake", num_trials=9)
    with pytest.raises(ConfigError, match="from first_init_state 7 on asks for more"):
        list_trials(FAKE, "fake", num_trials=2, first_init_state=7)
    with pytest.raises(ConfigError, match="no task 9"):
        list_trials(FAKE, "fake", task_ids=(9,), num_trials=1)
    with pytest.raises(ConfigError, match="unknown suite 'real'"):
        list_trials(FAKE, "real", num_trials=1)
    with pytest.raises(ConfigError, match="num_trials_per_task must be at least 1"):
        list_trials(FAKE, "fake", num_trials=0)
