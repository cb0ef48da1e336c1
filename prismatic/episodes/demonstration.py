"""One demonstration: the scripted expert acts from a randomised state, now and then pushed off course.

Recorded is what the expert answers, not the pushes: so the data holds, for states beside the expert's own path, the
action that leads back. Held back at the first steps of lifting, too: shut fingers on a still hand would else be so rare
that a policy stays there for ever. With a policy that already learnt, that policy acts first, for a random number of steps, and the
expert says what it should have done (DAgger: Ross, Gordon and Bagnell, 2011). Left out, as in the public data sets, are
failures and no-ops.
"""

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prismatic.data.staging import stage_episode
from prismatic.episodes.pool import Parent
from prismatic.errors import ConfigError
from prismatic.expert import Expert
from prismatic.image import encode_jpeg
from prismatic.normalize import ACTION_DIMENSIONS
from prismatic.scene.suites import Libero, step_limit
from prismatic.simulator import LiberoSimulator

if TYPE_CHECKING:
    from prismatic.policy import Policy

NO_OP_NORM = 1e-4  # of the six motion numbers, below which nothing moves
FIRST_ENV_SEED = 1_000_000  # collection draws its states from here on; evaluation's env seeds are small numbers
BURST_SHARE = 0.07  # chance that a push starts at a step
BURST_STEPS = (3, 9)
DISPLACEMENT_SHARE = 0.5  # of the episodes start with a long push
DISPLACEMENT_STEPS = (5, 16)
HESITATION_STEPS = (0, 9)  # for which the hand is held back when it begins to lift
POLICY_STEPS = (5, 80)  # of an episode, where a policy acts first


@dataclass(frozen=True)
class Job:
    """An episode to be recorded: where, and the file it goes to."""

    suite: str
    task_id: int
    quality: str
    path: Path

    @property
    def scene(self) -> tuple[str, int, str]:
        """What a simulator is built for."""
        return self.suite, self.task_id, self.quality

    def record(self, sim: LiberoSimulator, alive: Callable[[], None]) -> int:
        """Record it into `path`; the number of recorded steps, or 0 (and no file) where it was no success. alive: called at each step."""
        raise NotImplementedError


@dataclass(frozen=True)
class Record:
    """The pool's Work of a collection: jobs in, their number of recorded steps out. policy: folder of the one that acts first."""

    policy: str = ""

    def start(self, parent: Parent, *, first: bool) -> None:
        """Load the policy before the first image is rendered: torchvision crashes when it is imported after that."""
        if self.policy:
            learnt_policy(self.policy)

    def build(self, scene: tuple[str, int, str]) -> LiberoSimulator:
        suite, task_id, quality = scene
        return Libero().simulator(suite, task_id, quality=quality)

    def play(self, sim: LiberoSimulator, job: Job, parent: Parent) -> int:
        return job.record(sim, parent.alive)


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


class EpisodeWriter:
    """The steps of an episode but for its no-ops: what the simulator shows, drawn when the episode is written, and the action that follows."""

    def __init__(self, sim: LiberoSimulator) -> None:
        self._sim = sim
        # a moment, its images where they had been drawn, and the action
        self._steps: list[tuple[list[np.ndarray], tuple[bytes, ...] | None, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def note(self, action: np.ndarray, frames: tuple[np.ndarray, np.ndarray] | None = None) -> bool:
        """Keep the present moment with an action (7,) in LIBERO's convention; False, and nothing kept, for a no-op.

        frames: the camera's in front and the wrist's, where they have been rendered already.
        """
        if is_no_op(action, self._steps[-1][-1] if self._steps else None):
            return False
        images = frames and tuple(map(encode_jpeg, frames))
        self._steps.append((self._sim.moment(), images, action))
        return True

    def stage(self, path: Path, *, file_path: str, alive: Callable[[], None]) -> None:
        """Write what was kept as a staged episode. alive: called at each step."""
        steps, sim = [], self._sim
        for moment, images, action in self._steps:
            alive()
            sim.show(moment)
            images = images or (encode_jpeg(sim.frame()), encode_jpeg(sim.wrist()))
            steps.append((*images, sim.state(), sim.joint_angles(), action))
        front, wrist, state, joint_state, actions = zip(*steps, strict=True)
        stage_episode(
            path,
            images=front,
            wrist_images=wrist,
            state=np.array(state),
            joint_state=np.array(joint_state),
            action=np.array(actions, dtype=np.float32),
            instruction=sim.instruction,
            file_path=file_path,
        )


@functools.cache
def learnt_policy(folder: str) -> "Policy":
    """Once a process, on one thread and without a GPU: several simulator processes each have their own. ConfigError for another robot's."""
    import torch

    from prismatic.checkpoint import load_policy

    torch.set_num_threads(1)
    policy = load_policy(folder, device="cpu")
    if policy.processor.action_dim != len(ACTION_DIMENSIONS):
        said = f"policy_checkpoint {folder} answers with {policy.processor.action_dim} numbers"
        raise ConfigError(f"{said} and LIBERO takes {len(ACTION_DIMENSIONS)}: give another, or none")
    return policy


def beginning(generator: np.random.Generator, perturbation: float) -> tuple[int, Pushes]:
    """Seed of the state in which an expert's episode begins, the same with any perturbation, and the pushes to come."""
    pushes = Pushes(generator, perturbation)
    return int(generator.integers(FIRST_ENV_SEED, 2**31)), pushes


@dataclass(frozen=True)
class Demonstration(Job):
    """What decides an episode of the expert."""

    attempt: int
    seed: int
    perturbation: float  # largest push, in units of the full command
    policy: str = ""  # checkpoint or adapter folder that acts first; none if empty

    def record(self, sim: LiberoSimulator, alive: Callable[[], None]) -> int:
        """As Job says; 0 where the expert failed."""
        generator = np.random.default_rng([self.seed, self.task_id, self.attempt, *([1] if self.policy else [])])
        reset_seed, pushes = beginning(generator, self.perturbation)
        sim.reset(None, seed=reset_seed)
        expert = Expert(sim)
        policy = learnt_policy(self.policy) if self.policy else None
        policy_steps = int(generator.integers(*POLICY_STEPS)) if policy else 0
        hesitation = int(generator.integers(*HESITATION_STEPS)) if self.perturbation else 0
        writer = EpisodeWriter(sim)
        queue: deque[np.ndarray] = deque()
        for step in range(step_limit(self.suite)):
            alive()
            action = expert.chunk(None, sim.instruction)[0]
            recorded = action.copy()
            recorded[6] = 1.0 - 2.0 * action[6]  # LIBERO's convention: -1 open, +1 close
            if policy and step < policy_steps:
                if not queue:  # as in an evaluation, a chunk is executed whole before the policy looks again
                    frame, wrist = sim.frame(), sim.wrist()
                    if policy.num_actions_chunk == 1:  # of a chunk's steps only the expert's own can be learnt
                        writer.note(recorded, (frame, wrist))
                    second = wrist if policy.num_images == 2 else None
                    state = sim.state() if policy.uses_state else None
                    queue.extend(policy.chunk(frame, sim.instruction, second, state, episode=self.path))
                executed = queue.popleft()
            else:
                writer.note(recorded)
                executed = action.copy()
                executed[:3] = np.clip(action[:3] + pushes(), -1, 1)
                if hesitation and action[6] < 0.5 and action[2] > 0:  # it raises what the fingers hold
                    executed[:6] = 0.0
                    hesitation -= 1
            if sim.step(executed):
                if not len(writer):  # solved before the expert's turn
                    return 0
                name = f"{self.suite}/task{self.task_id}/seed{self.seed}/attempt{self.attempt}"
                writer.stage(self.path, file_path=name + ("/policy" if self.policy else ""), alive=alive)
                return len(writer)
        return 0
