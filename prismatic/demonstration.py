"""One demonstration: the scripted expert acts from a randomised state, now and then pushed off course.

Recorded is what the expert answers, not the pushes: so the data holds, for states beside the expert's own path, the
action that leads back. Left out, as in the public data sets, are failures and no-ops.
"""

import multiprocessing
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from prismatic.data.staging import stage_episode
from prismatic.errors import ConfigError
from prismatic.expert import Expert
from prismatic.image import encode_jpeg
from prismatic.simulator import FRONT, WRIST, Simulator, step_limit

NO_OP_NORM = 1e-4  # of the six motion numbers, below which nothing moves
FIRST_ENV_SEED = 1_000_000  # collection draws its states from here on; evaluation's env seeds are small numbers
BURST_SHARE = 0.07  # chance that a push starts at a step
BURST_STEPS = (3, 9)
DISPLACEMENT_SHARE = 0.5  # of the episodes start with a long push
DISPLACEMENT_STEPS = (5, 16)


@dataclass(frozen=True)
class Job:
    """What decides a demonstration, and the file it goes to."""

    suite: str
    task_id: int
    attempt: int
    seed: int
    perturbation: float  # largest push, in units of the full command
    quality: str
    path: Path


class Pushes:
    """Correlated noise: now and then a constant push in a random direction for some steps, else nothing."""

    def __init__(self, generator: np.random.Generator, size: float) -> None:
        self._generator, self._size = generator, size
        self._left = 0
        self._push = np.zeros(3)
        if generator.random() < DISPLACEMENT_SHARE:
            self._start(DISPLACEMENT_STEPS)

    def _start(self, steps: tuple[int, int]) -> None:
        self._left = int(self._generator.integers(*steps))
        self._push = self._generator.uniform(-self._size, self._size, size=3)

    def __call__(self) -> np.ndarray:
        """(3,) to be added to the next command."""
        if self._left == 0 and self._generator.random() < BURST_SHARE:
            self._start(BURST_STEPS)
        if self._left == 0:
            return np.zeros(3)
        self._left -= 1
        return self._push


def is_no_op(action: np.ndarray, last_kept: np.ndarray | None) -> bool:
    """Whether a recorded action (7,) changes nothing: no motion, and the gripper as in the last kept action."""
    still = bool(np.linalg.norm(action[:6]) < NO_OP_NORM)
    return still and (last_kept is None or action[6] == last_kept[6])


def demonstrate(sim: Simulator, job: Job) -> int:
    """Record one episode into `job.path`; the number of recorded steps, or 0 (and no file) where the expert failed."""
    generator = np.random.default_rng([job.seed, job.task_id, job.attempt])
    pushes = Pushes(generator, job.perturbation)
    sim.reset(None, seed=int(generator.integers(FIRST_ENV_SEED, 2**31)))
    expert = Expert(sim)
    images, wrist_images, states, joints, actions = [], [], [], [], []
    for _ in range(step_limit(job.suite)):
        action = expert(None, sim.instruction)
        recorded = action.copy()
        recorded[6] = 1.0 - 2.0 * action[6]  # LIBERO's convention: -1 open, +1 close
        if not is_no_op(recorded, actions[-1] if actions else None):
            state, joint_state = sim.proprio()
            images.append(encode_jpeg(sim.frame()))
            wrist_images.append(encode_jpeg(sim.wrist()))
            states.append(state)
            joints.append(joint_state)
            actions.append(recorded)
        executed = action.copy()
        executed[:3] = np.clip(action[:3] + pushes(), -1, 1)
        if sim.step(executed):
            stage_episode(
                job.path,
                images=images,
                wrist_images=wrist_images,
                state=np.array(states),
                joint_state=np.array(joints),
                action=np.array(actions, dtype=np.float32),
                instruction=sim.instruction,
                file_path=f"{job.suite}/task{job.task_id}/seed{job.seed}/attempt{job.attempt}",
            )
            return len(actions)
    return 0


def serve(connection: Connection) -> None:
    """A worker process: jobs in, their number of steps or an exception out, until the parent's end."""
    sim: Simulator | None = None
    try:
        while True:
            job: Job = connection.recv()
            try:
                if sim is None or (sim.suite, sim.task_id) != (job.suite, job.task_id):
                    if sim:
                        sim.close()
                    sim = Simulator(job.suite, job.task_id, cameras=(FRONT, WRIST), quality=job.quality)
                connection.send(demonstrate(sim, job))
            except ConfigError as error:
                connection.send(error)
            except Exception:
                connection.send(RuntimeError(traceback.format_exc()))
    except (EOFError, OSError):  # the parent is gone
        pass


class Worker:
    """The parent's side of a worker process; it has at most one job."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        """Start a job."""
        self.job = job
        self.connection.send(job)

    def answer(self) -> int:
        """Steps of the finished job (0: the expert failed). Raises what the process raised."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise ConfigError(
                f"a simulator process ended with code {self.process.exitcode}, perhaps for want of memory "
                "(it needs 2 GB): give the same command again with a smaller num_workers"
            ) from None
        self.job = None
        if isinstance(answer, Exception):
            raise answer
        return answer


def stop(workers: Sequence[Worker]) -> None:
    """End the processes at once: what they have finished is on disk, what they haven't is not."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join()
