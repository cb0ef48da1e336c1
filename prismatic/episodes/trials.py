"""Which episodes a run consists of, and what each is called."""

import importlib
from collections.abc import Sequence
from typing import Any

from prismatic.episodes.player import Trial
from prismatic.errors import ConfigError


def plan(
    suite: str,
    *,
    task_ids: Sequence[int] = (),
    num_trials: int = 50,
    first_init_state: int = 0,
    env_seed: int = 0,
    simulator: str = "prismatic.simulator",
) -> list[Trial]:
    """All trials of a run: of each task (none named: all) `num_trials` stored states from `first_init_state` on.

    ConfigError for an unknown suite or task, or for more trials than stored states.
    """
    world = importlib.import_module(simulator)
    tasks = sorted(set(task_ids)) or range(world.num_tasks(suite))
    if num_trials < 1 or first_init_state < 0:
        raise ConfigError("num_trials_per_task must be at least 1 and first_init_state at least 0")
    trials = []
    for task_id in tasks:
        stored = world.num_init_states(suite, task_id)
        if first_init_state + num_trials > stored:
            raise ConfigError(
                f"task {task_id} of {suite} has {stored} stored initial states: "
                f"num_trials_per_task {num_trials} from first_init_state {first_init_state} on asks for more"
            )
        states = range(first_init_state, first_init_state + num_trials)
        trials += [Trial(suite=suite, task_id=task_id, init_state=state, env_seed=env_seed) for state in states]
    return trials


def names(world: Any, trial: Trial) -> dict[str, Any]:
    """The instruction, and the video's number: OpenVLA's count of episodes when all stored states are played."""
    stored = world.num_init_states(trial.suite, trial.task_id)
    return {
        "instruction": world.instruction(trial.suite, trial.task_id),
        "number": trial.task_id * stored + trial.init_state + 1,
    }
