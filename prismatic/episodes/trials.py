"""Which episodes a run consists of, and in which order simulator processes take them."""

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from prismatic.errors import ConfigError
from prismatic.scene.suites import Benchmark


@dataclass(frozen=True)
class Trial:
    """One episode to be played: what it is, never its place in a queue."""

    suite: str
    task_id: int
    init_state: int
    env_seed: int

    @property
    def id(self) -> str:
        return f"{self.suite}/task{self.task_id}/state{self.init_state}/seed{self.env_seed}"

    @property
    def start(self) -> int | np.ndarray | None:
        """The initial state, as Simulator.reset takes it."""
        return self.init_state

    @property
    def reset_seed(self) -> int | None:
        """Seed of a randomised start, where `start` is None."""
        return None

    @property
    def max_steps(self) -> int | None:
        """Steps after which it has failed; None: the suite's limit."""
        return None

    @property
    def scene(self) -> tuple[str, int, int]:
        """What a simulator is built for."""
        return self.suite, self.task_id, self.env_seed


def list_trials(
    benchmark: Benchmark,
    suite: str,
    *,
    task_ids: Sequence[int] = (),
    num_trials: int = 50,
    first_init_state: int = 0,
    env_seed: int = 0,
) -> list[Trial]:
    """All trials of a run: of each task (none named: all) `num_trials` stored states from `first_init_state` on.

    ConfigError for an unknown suite or task, or for more trials than stored states.
    """
    tasks = sorted(set(task_ids)) or range(benchmark.num_tasks(suite))
    if num_trials < 1 or first_init_state < 0:
        raise ConfigError("num_trials_per_task must be at least 1 and first_init_state at least 0")
    trials = []
    for task_id in tasks:
        stored = benchmark.num_init_states(suite, task_id)
        if first_init_state + num_trials > stored:
            raise ConfigError(
                f"task {task_id} of {suite} has {stored} stored initial states: "
                f"num_trials_per_task {num_trials} from first_init_state {first_init_state} on asks for more"
            )
        states = range(first_init_state, first_init_state + num_trials)
        trials += [Trial(suite=suite, task_id=task_id, init_state=state, env_seed=env_seed) for state in states]
    return trials


def video_number(benchmark: Benchmark, trial: Trial) -> int:
    """OpenVLA's count of episodes when all stored states are played."""
    return trial.task_id * benchmark.num_init_states(trial.suite, trial.task_id) + trial.init_state + 1


class TrialQueue:
    """A list of trials as the pool's Source: a process keeps its scene as long as there are trials of it."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        self._pending: dict[Hashable, deque[Trial]] = {}
        for trial in trials:
            self._pending.setdefault(trial.scene, deque()).append(trial)

    def next_job(self, scene: Hashable, busy: Counter[Hashable]) -> Trial | None:
        """One of the same scene if there is any, else of the scene with the most trials left per process on it."""
        if not self._pending:
            return None
        if scene not in self._pending:
            scene = max(self._pending, key=lambda scene: len(self._pending[scene]) / (1 + busy[scene]))
        trial = self._pending[scene].popleft()
        if not self._pending[scene]:
            del self._pending[scene]
        return trial
