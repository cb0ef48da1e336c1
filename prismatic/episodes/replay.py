"""LIBERO's own demonstrations (HDF5, a file a task) → staged episodes, played again in the simulator at 256 pixels.

As modified_libero_rlds was made: from a demonstration's first state, ten settling steps, then its actions. A no-op is
neither recorded nor executed, what happens after the first success is played too, and the episode is kept if its last
step is a success. Unlike there, fixtures stand where `env_seed` 0 puts them at the first reset, in every demonstration
(there each stands where the resets before it left the random numbers): so order and interruptions change nothing.
"""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from prismatic.arrays import read_arrays
from prismatic.atomic import write_json
from prismatic.episodes.demonstration import EpisodeWriter, Job
from prismatic.errors import ConfigError
from prismatic.normalize import ACTION_DIMENSIONS
from prismatic.records import read_object
from prismatic.scene.suites import init_states, task_name
from prismatic.simulator import LiberoSimulator

DEMO = re.compile(r"demo_\d+")  # a demonstration's group in a file
FAILED = ".failed"  # suffix of an empty file that tells that an episode was no success
SOURCES = "sources.json"  # beside the episodes: demonstration → SHA-256 of what is played of it


@dataclass(frozen=True)
class Replay(Job):
    """A demonstration in an HDF5 file, to be played again."""

    source: Path
    demo: str  # its group in the file
    steps: int  # actions in it, no-ops included

    def record(self, sim: LiberoSimulator, alive: Callable[[], None]) -> int:
        """Play it into `path`; the number of kept steps, or 0 (and no file) where it doesn't end in success."""
        first_state, actions = read_demo(self.source, self.demo)
        sim.reset(first_state)
        writer = EpisodeWriter(sim)
        solved = False
        for action in actions:
            alive()
            if writer.note(action):
                gripper = (1 - action[6]) / 2  # the policy's convention; the simulator's sign of it is the file's own
                solved = sim.step(np.append(action[:6], gripper))
        if not solved:
            return 0
        writer.stage(self.path, file_path=f"{self.source.name}/{self.demo}", alive=alive)
        return len(writer)


class Replays:
    """The demonstrations of a suite's HDF5 files, each to be replayed once, in order."""

    actor = "replay"

    def __init__(self, jobs: Sequence[Replay]) -> None:
        self.jobs, self.total = jobs, len(jobs)
        self._next = (job for job in jobs if not _is_done(job))

    def compare(self, stage: Path) -> None:
        """Note what is in each demonstration; ConfigError where an earlier call played another one of the same name into `stage`."""
        note = stage / SOURCES
        before = read_object(note) if note.is_file() else {}
        now = dict(before)
        for job in self.jobs:
            name = f"{job.source.name}/{job.demo}"
            content = b"".join(array.tobytes() for array in read_demo(job.source, job.demo))
            now[name] = hashlib.sha256(content).hexdigest()
            if _is_done(job) and before.get(name, now[name]) != now[name]:
                raise ConfigError(
                    f"{job.demo} of {job.source} (from_hdf5) is not the one that was played into {stage}: "
                    "give another dataset_name, or delete that folder and the data set beside it"
                )
        if now != before:
            write_json(note, now)

    def found(self) -> int:
        """How many of them earlier calls have played."""
        return sum(map(_is_done, self.jobs))

    def next_job(self, scene: Hashable = None) -> Replay | None:
        """The next one to be played; None when all have been given out."""
        return next(self._next, None)

    def finished(self, job: Job, *, success: bool) -> int:
        """1, by which the work is nearer to its end."""
        return 1

    def report(self) -> list[str]:
        """What was left out, in sentences. ConfigError where nothing is left."""
        kept = [job for job in self.jobs if job.path.is_file()]
        if not kept:
            raise ConfigError(
                f"none of the {self.total} demonstrations in {self.jobs[0].source.parent} (from_hdf5) ends in success "
                f"when replayed: are they {self.jobs[0].suite}'s, and does doctor.py find the simulator right?"
            )
        wanted = Counter(job.task_id for job in self.jobs)
        dropped = wanted - Counter(job.task_id for job in kept)
        said = "demonstrations dropped, they don't end in success"
        lines = [f"task {task_id}: {count} of {wanted[task_id]} {said}" for task_id, count in dropped.items()]
        steps = sum(job.steps for job in kept)
        no_ops = steps - sum(len(read_arrays(job.path)["action"]) for job in kept)
        return [
            *lines,
            f"{len(kept)} of {self.total} demonstrations kept; {no_ops} of their {steps} steps are no-ops, dropped",
        ]


def _is_done(job: Job) -> bool:
    return job.path.is_file() or job.path.with_suffix(FAILED).is_file()


def find_replays(folder: Path, suite: str, task_ids: Iterable[int], *, stage: Path, limit: int) -> list[Replay]:
    """The first `limit` demonstrations of each task's file; they will be staged in `stage`.

    ConfigError, before anything is played, for a folder or file that is missing, damaged or not in LIBERO's layout.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {folder} (from_hdf5): give the one that holds LIBERO's *_demo.hdf5 files"
        )
    files = {task_id: folder / f"{task_name(suite, task_id)}_demo.hdf5" for task_id in task_ids}
    for task_id, path in files.items():
        if not path.is_file():
            raise ConfigError(
                f"{folder} (from_hdf5) lacks {path.name} (task {task_id}): download it, or name the tasks there are (task_ids)"
            )
    return [
        Replay(
            suite=suite,
            task_id=task_id,
            quality="standard",
            path=stage / f"task{task_id:02d}-{number:05d}.npz",
            source=path,
            demo=f"demo_{number}",
            steps=steps,
        )
        for task_id, path in files.items()
        for number, steps in _lengths(path, state_size=init_states(suite, task_id).shape[1])[:limit]
    ]


def _lengths(path: Path, *, state_size: int) -> list[tuple[int, int]]:
    """Number and steps of each demonstration in a file, once all of them are seen to be in LIBERO's layout."""
    with _data(path) as data:
        lengths = []
        for number in sorted(int(name[5:]) for name in map(str, data) if DEMO.fullmatch(name)):
            for name, size in (("states", state_size), ("actions", len(ACTION_DIMENSIONS))):
                array = data.get(f"demo_{number}/{name}")
                shape = array.shape if isinstance(array, h5py.Dataset) and array.dtype.kind in "fiu" else ()
                if len(shape) != 2 or shape[0] == 0 or shape[1] != size:
                    raise ConfigError(
                        f"data/demo_{number}/{name} of {path} (from_hdf5) should be (steps, {size}) and is "
                        f"{shape or 'missing, or no numbers'}: is the file of this suite and task?"
                    )
            lengths.append((number, shape[0]))
    return lengths


def read_demo(path: Path, demo: str) -> tuple[np.ndarray, np.ndarray]:
    """First simulator state (D,) and actions (T, 7) in LIBERO's convention, both float64."""
    with _data(path) as data:
        first_state = np.asarray(data[demo]["states"][0], dtype=np.float64)  # pyright: ignore[reportIndexIssue]
        actions = np.asarray(data[demo]["actions"][()], dtype=np.float64)  # pyright: ignore[reportIndexIssue]
    if not (np.isfinite(first_state).all() and np.isfinite(actions).all()):
        raise ConfigError(f"data/{demo} of {path} (from_hdf5) holds numbers that are not finite: delete that group")
    return first_state, actions


@contextlib.contextmanager
def _data(path: Path) -> Iterator[h5py.Group]:
    """The group that holds a file's demonstrations; what HDF5 can't read becomes a ConfigError."""
    try:
        with h5py.File(path, "r") as file:
            data = file.get("data")
            if not isinstance(data, h5py.Group) or not any(map(DEMO.fullmatch, data)):
                raise ConfigError(
                    f"{path} (from_hdf5) holds no demonstration (data/demo_0 …): it is not a file of LIBERO's"
                )
            yield data
    except (OSError, RuntimeError, KeyError) as error:  # truncated, damaged inside, or changed since it was listed
        raise ConfigError(f"{path} (from_hdf5) can't be read ({error}): download it again") from None
