"""LIBERO's task suites: names, tasks, instructions, stored states, step limits. ConfigError for what isn't there.

`Benchmark` is what evaluation needs of a benchmark, `Libero` that of these suites.

Any distribution that provides `libero.libero` works: the one that asks a question on its first import is answered, and
stored states are read without running a pickle.
"""

import contextlib
import hashlib
import io
import os
import unittest.mock
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from prismatic.errors import ConfigError
from prismatic.rollout import Recorder, Simulator
from prismatic.scene import renderer
from prismatic.scene.recorder import SceneRecorder
from prismatic.simulator import LiberoSimulator, Task

STEP_LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
FORGET_PATHS = "delete that file, or unset LIBERO_CONFIG_PATH: LIBERO writes it anew"
REWORDED = ("_lan", "_task")  # LIBERO-PRO suites whose instruction stands in the BDDL file only


@cache
def _benchmark() -> dict[str, list[Any]]:
    """Suite name → its LIBERO tasks, for every suite whose files are there and whose step limit is known."""
    try:
        # The original LIBERO asks about folders on its first import ("n": keep the default), and prints as it loads.
        with unittest.mock.patch("builtins.input", return_value="n"), contextlib.redirect_stdout(io.StringIO()):
            from libero.libero import benchmark, get_libero_path

            found = {name: suite().tasks for name, suite in benchmark.get_benchmark_dict().items() if _parent(name)}
            bddl_files = Path(get_libero_path("bddl_files"))
    except ImportError as error:
        raise ConfigError(f"LIBERO is not installed ({error}): pip install -r requirements.txt") from error
    except Exception as error:  # what yaml and LIBERO raise for a file of paths that was cut off or is another's
        raise ConfigError(f"{_libero_config()} can't be used ({type(error).__name__}): {FORGET_PATHS}") from error
    there = {
        name: list(tasks)
        for name, tasks in found.items()
        if tasks and (bddl_files / tasks[0].problem_folder / tasks[0].bddl_file).is_file()
    }
    if not there:
        raise ConfigError(f"LIBERO's tasks are not in {bddl_files}, where {_libero_config()} has them: {FORGET_PATHS}")
    return there


def _libero_config() -> str:
    """The file in which LIBERO keeps where its files are."""
    return f"{os.environ.get('LIBERO_CONFIG_PATH', 'the settings folder of LIBERO')}/config.yaml"


def _parent(suite: str) -> str | None:
    """The standard suite that a LIBERO-PRO suite varies (`libero_spatial_swap` → `libero_spatial`), or itself."""
    return next((name for name in STEP_LIMITS if suite == name or suite.startswith(name + "_")), None)


def suites() -> list[str]:
    """Names of the task suites there are: LIBERO's own first, then LIBERO-PRO's."""
    return sorted(_benchmark(), key=lambda name: (name not in STEP_LIMITS, name))


def _tasks(suite: str) -> list[Any]:
    if suite not in _benchmark():
        raise ConfigError(f"unknown task suite {suite!r} (task_suite_name): there are {', '.join(suites())}")
    return _benchmark()[suite]


def _task(suite: str, task_id: int) -> Any:
    tasks = _tasks(suite)
    if not 0 <= task_id < len(tasks):
        raise ConfigError(f"{suite} has no task {task_id} (task_ids): its tasks are 0 to {len(tasks) - 1}")
    return tasks[task_id]


def task_name(suite: str, task_id: int) -> str:
    """LIBERO's name of the task, with which the names of its files begin."""
    return _task(suite, task_id).name


def num_tasks(suite: str) -> int:
    """How many tasks the suite has."""
    return len(_tasks(suite))


def step_limit(suite: str) -> int:
    """Steps after which an episode has failed; a LIBERO-PRO suite takes its parent's."""
    _tasks(suite)
    return STEP_LIMITS[_parent(suite) or suite]


def bddl_file(suite: str, task_id: int) -> Path:
    """The file that describes the task's scene and goal."""
    from libero.libero import get_libero_path

    task = _task(suite, task_id)
    return Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file


def instruction(suite: str, task_id: int) -> str:
    """The sentence for the policy: LIBERO's name of the task; in a reworded suite what the BDDL file says."""
    task = _task(suite, task_id)
    if not suite.endswith(REWORDED):
        return task.language
    text = bddl_file(suite, task_id).read_text()
    return " ".join(text.split("(:language", 1)[1].split(")", 1)[0].split())


def _states_file(suite: str, task_id: int) -> Path:
    """Of stored states: an .npz where there is one, else LIBERO's own torch file, which may be missing."""
    from libero.libero import get_libero_path

    task = _task(suite, task_id)
    path = Path(get_libero_path("init_states")) / task.problem_folder / task.init_states_file
    packed = path.with_name(path.name + ".npz")
    return packed if packed.is_file() else path


@cache
def init_states(suite: str, task_id: int) -> np.ndarray:
    """The stored initial states (N, state size) float64: time, joint positions, joint velocities."""
    path = _states_file(suite, task_id)
    if not path.is_file():
        raise ConfigError(f"{path} is missing: task {task_id} of {suite} has no stored initial states")
    if path.suffix != ".npz":
        return _torch_array(path)
    with np.load(path, allow_pickle=False) as archive:
        return archive["states"]


def _torch_array(path: Path) -> np.ndarray:
    """The NumPy array in a torch file, with NumPy's own constructors as the only code that may run."""
    import torch

    # NumPy 1 wrote its module's old name, NumPy 2 the new one
    reconstruct: Any = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    allowed: list[Any] = [(reconstruct, name) for name in names]
    with torch.serialization.safe_globals([*allowed, np.ndarray, np.dtype, type(np.dtype(np.float64))]):
        return np.asarray(torch.load(path, weights_only=True))


class Benchmark(Protocol):
    """Task suites and their simulator. It is pickled, so that each simulator process has it too."""

    def num_tasks(self, suite: str) -> int: ...
    def num_init_states(self, suite: str, task_id: int) -> int: ...
    def instruction(self, suite: str, task_id: int) -> str: ...
    def step_limit(self, suite: str) -> int: ...
    def files_fingerprint(self, suite: str) -> str: ...
    def simulator(self, suite: str, task_id: int, *, env_seed: int = 0, quality: str = "standard") -> Simulator: ...
    def recorder(self, sim: Simulator) -> Recorder: ...
    def golden_frame(self) -> dict[str, Any]: ...


class Libero:
    """The Benchmark of LIBERO's and LIBERO-PRO's suites."""

    num_tasks = staticmethod(num_tasks)
    instruction = staticmethod(instruction)
    step_limit = staticmethod(step_limit)

    def num_init_states(self, suite: str, task_id: int) -> int:
        """50 in LIBERO's suites."""
        return len(init_states(suite, task_id))

    def files_fingerprint(self, suite: str) -> str:
        """16 hex digits of the suite's BDDL files and stored states: LIBERO_CONFIG_PATH may lead to another LIBERO's."""
        digest = hashlib.sha256()
        for task_id in range(num_tasks(suite)):
            for path in (bddl_file(suite, task_id), _states_file(suite, task_id)):
                digest.update(path.read_bytes() if path.is_file() else b"missing")
        return digest.hexdigest()[:16]

    def simulator(self, suite: str, task_id: int, *, env_seed: int = 0, quality: str = "standard") -> LiberoSimulator:
        """A simulator of the task; chooses the renderer where nobody has."""
        renderer.choose_renderer()
        files = bddl_file(suite, task_id), init_states(suite, task_id)
        task = Task(suite, task_id, instruction(suite, task_id), *files)
        return LiberoSimulator(task, env_seed=env_seed, quality=quality)

    def recorder(self, sim: Simulator) -> SceneRecorder:
        """Who watches the episode that has just been reset."""
        assert isinstance(sim, LiberoSimulator)
        return SceneRecorder(sim.environment)

    def golden_frame(self) -> dict[str, Any]:
        """How this machine draws golden_frame.png's scene: about 3 s of one core."""
        sim = self.simulator("libero_spatial", 0)
        sim.reset(0)
        found = renderer.compare_with_golden(sim.frame(), renderer.choose_renderer())
        found["gl_renderer"] = renderer.drawn_by()
        sim.close()
        return found
