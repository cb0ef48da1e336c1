"""Which episodes a run consists of, and in which order simulator processes take them."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from prismatic.errors import ConfigError
from prismatic.scene.suites import Benchmark


@dataclass(frozen=True)
class Recording:
    """A data set's episode: it began in `start` (a state as Task.init_states has them) or, where that is None, at random from `seed`."""

    file_path: str
    start: np.ndarray | None
    seed: int | None
    actions: np.ndarray  # (T, 7) float32, gripper 1 open … 0 close
    states: np.ndarray | None  # (T, 8) float32 as Simulator.state, where they were recorded
    first_frame: bytes  # JPEG


@dataclass(frozen=True)
class Trial:
    """One episode to be played: what it is, never its place in a queue. init_state: of a recorded one, its number in the data set."""

    suite: str
    task_id: int
    init_state: int
    env_seed: int
    recording: Recording | None = field(default=None, compare=False)

    @property
    def id(self) -> str:
        kind = "demo" if self.recording else "state"
        return f"{self.suite}/task{self.task_id}/{kind}{self.init_state}/seed{self.env_seed}"

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
    trials = []
    for task_id in sorted(set(task_ids)) or range(benchmark.num_tasks(suite)):
        stored = benchmark.num_init_states(suite, task_id)
        if first_init_state + num_trials > stored:
            raise ConfigError(
                f"task {task_id} of {suite} has {stored} stored initial states: "
                f"num_trials_per_task {num_trials} from first_init_state {first_init_state} on asks for more"
            )
        states = range(first_init_state, first_init_state + num_trials)
        trials += [Trial(suite=suite, task_id=task_id, init_state=state, env_seed=env_seed) for state in states]
    return trials


class TrialQueue:
    """A list of trials for the pool: a process keeps its scene as long as there are trials of it."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        self._pending = list(trials)

    def next_job(self, scene: Hashable) -> Trial | None:
        """One of the same scene if there is any, else of the scene with the most trials left."""
        left = Counter(trial.scene for trial in self._pending)
        if not left:
            return None
        chosen = scene if scene in left else max(left, key=lambda scene: left[scene])
        return self._pending.pop(next(n for n, trial in enumerate(self._pending) if trial.scene == chosen))
