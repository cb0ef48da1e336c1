"""suites.py: every task of LIBERO's five suites and of LIBERO-PRO's sixteen, as eval.py plans it."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prismatic.episodes.trials import list_trials
from prismatic.errors import ConfigError
from prismatic.scene import suites

PARENTS = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
PRO = [f"{parent}_{kind}" for parent in PARENTS for kind in ("lan", "object", "swap", "task")]


@pytest.mark.parametrize("suite", [*PARENTS, "libero_90", *PRO])
def test_every_task_can_be_planned(suite: str) -> None:
    trials = list_trials(suites.Libero(), suite, num_trials=50)
    assert len(trials) == 50 * suites.num_tasks(suite) == 50 * (90 if suite == "libero_90" else 10)
    for task_id in range(suites.num_tasks(suite)):
        words = suites.instruction(suite, task_id)
        assert words == words.strip() and len(words.split()) >= 3 and "_" not in words
        scene = suites.bddl_file(suite, task_id).read_text()
        assert "(:goal" in scene and "(:language" in scene
        states = suites.init_states(suite, task_id)
        assert states.shape[0] == 50 and states.dtype == np.float64 and np.isfinite(states).all()
        assert len(np.unique(states, axis=0)) > 1


def test_the_reworded_suites_say_something_else() -> None:
    for parent in PARENTS:
        for kind, fewest in (("lan", 8), ("task", 8), ("swap", 0), ("object", 0)):
            told = [
                (suites.instruction(f"{parent}_{kind}", task), suites.instruction(parent, task)) for task in range(10)
            ]
            changed = sum(new != old for new, old in told)
            assert changed >= fewest and (fewest or changed == 0), (parent, kind, told)


def test_suites_limits_and_instructions() -> None:
    assert suites.suites()[:5] == sorted(suites.STEP_LIMITS)
    assert set(suites.suites()) >= {*PARENTS, "libero_90", *PRO}
    limits = {"libero_spatial": 220, "libero_object_swap": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
    assert {suite: suites.step_limit(suite) for suite in limits} == limits
    black_bowl = "pick up the black bowl between the plate and the ramekin and place it on the plate"
    assert suites.instruction("libero_spatial", 0) == suites.instruction("libero_spatial_swap", 0) == black_bowl
    reworded = "lift the black bowl between the plate and ramekin and set it on the plate"
    assert suites.instruction("libero_spatial_lan", 0) == reworded


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"libero_spatal.*task_suite_name.*libero_spatial"):
        suites.step_limit("libero_spatal")
    with pytest.raises(ConfigError, match=r"no task 10.*0 to 9"):
        suites.instruction("libero_spatial", 10)


def test_paths_of_a_libero_that_is_gone_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    for content in ("bddl_files: /gone\ninit_states: /gone\n", "bddl_files: [", "- a list"):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.yaml.*unset LIBERO_CONFIG_PATH"):
            suites._benchmark.__wrapped__()


def test_torch_init_states_are_read_without_running_a_pickle(tmp_path: Path) -> None:
    states = np.random.default_rng(0).normal(size=(3, 5))
    torch.save(states, tmp_path / "good")
    np.testing.assert_array_equal(suites._torch_array(tmp_path / "good"), states)
    torch.save(Evil(tmp_path / "ran"), tmp_path / "evil")
    with pytest.raises(pickle.UnpicklingError):
        suites._torch_array(tmp_path / "evil")
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)
