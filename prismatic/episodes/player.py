"""What a simulator process does with a trial: plays it, films it, says why it ended so.

What a trial gives depends on its id alone, not on the process, nor on the trials before it. A learned policy lives in the parent and is
asked over the pipe; the expert, recorded actions and the controls ("zero", "random") act here, beside the simulator.
"""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prismatic import machine
from prismatic.episodes.controls import PROTOCOL_SEED, instruction_given, moved_by_seed
from prismatic.episodes.film import Film
from prismatic.episodes.pool import Crashed, Parent
from prismatic.episodes.recorded import RecordedActions, RecordedEpisode
from prismatic.episodes.result import ReplayResult
from prismatic.episodes.trials import Trial
from prismatic.rollout import Actor, Simulator, rollout
from prismatic.scene.diagnosis import Diagnosis, diagnose
from prismatic.scene.suites import Benchmark, Libero

TIE_TOLERANCE = 1e-4  # top-1 margin that rounding can turn: a matrix product's last digits go by the batch size


@dataclass(frozen=True)
class Observation:
    """What a policy in the parent is asked about. Images are frames, or what Play.prepare made of them."""

    image: Any
    instruction: str
    wrist: Any = None
    state: np.ndarray | None = None  # (8,) as Simulator.state


@dataclass(frozen=True)
class Outcome:
    """What came of a trial. success is None when there is an error: a crash says nothing about the policy."""

    trial: Trial
    success: bool | None
    steps: int
    seconds: float
    error: str | None = None
    waited: float = 0.0  # of the seconds, those spent waiting for the parent's policy
    actions: np.ndarray | None = None  # (steps, 7) float32
    video: Path | None = None  # under its temporary name
    diagnosis: Diagnosis | None = None  # why it ended so; None: an error
    near_ties: list[int] = field(default_factory=list)  # steps at which the policy's margin was below TIE_TOLERANCE
    instruction_given: str | None = None
    moved_by_env_seed_mm: dict[str, float] | None = None
    replay: ReplayResult | None = None
    process: int = 0  # that played it
    peak_memory: int = 0  # bytes, of that process so far


class _ParentsPolicy:
    """The parent's policy, asked over the pipe."""

    def __init__(self, play: "Play", parent: Parent) -> None:
        self.num_images, self.uses_state = play.num_images, play.uses_state
        self._play, self._parent, self._step = play, parent, 0
        self.near_ties: list[int] = []

    def chunk(
        self,
        frame: np.ndarray | None,
        instruction: str,
        wrist: np.ndarray | None = None,
        state: np.ndarray | None = None,
    ) -> np.ndarray:
        prepare = self._play.prepare or (lambda image: image)
        images = [None if image is None else prepare(image) for image in (frame, wrist)]
        answer = self._parent.ask(Observation(images[0], instruction, images[1], state))
        if isinstance(answer, Exception):
            raise answer
        chunk, margin = answer
        if margin < TIE_TOLERANCE:
            self.near_ties.append(self._step)
        self._step += len(chunk[: self._play.num_open_loop_steps])
        return chunk


class _Control:
    """The floor of a score: "zero" holds still with the gripper open, "random" draws each number uniformly."""

    num_images, uses_state = 0, False

    def __init__(self, kind: str, seed: int, trial: Trial) -> None:
        self.kind = kind
        self.generator = np.random.default_rng([seed, *trial.id.encode()])

    def chunk(self, frame: Any, instruction: str, wrist: Any = None, state: Any = None) -> np.ndarray:
        if self.kind == "zero":
            return np.array([[0, 0, 0, 0, 0, 0, 1]], dtype=np.float32)
        motion, gripper = self.generator.uniform(-1, 1, size=6), self.generator.uniform(0, 1, size=1)
        return np.concatenate([motion, gripper]).astype(np.float32)[None]


@dataclass(frozen=True)
class Play:
    """The pool's Work of an evaluation. It is pickled, so it holds values only."""

    policy: str = "parent"  # "parent": ask over the pipe; "expert", "replay", "zero", "random": act inside the process
    num_images: int = 1  # that the parent's policy looks at: 2 adds the wrist camera
    uses_state: bool = False  # whether the parent's policy wants the robot's state
    num_open_loop_steps: int | None = None  # actions of a chunk that are executed, the first ones; None: all
    prepare: Callable[[np.ndarray], Any] | None = None  # applied to a frame before it is sent; None: sent as it is
    settle: int = 10  # steps of holding still before the first action
    seed: int = 0  # of the random policy
    quality: str = "standard"
    instruction: str = "keep"  # what the policy is given: see controls.instruction_given
    max_steps: int | None = None  # a limit below the suite's, for measuring speed
    video_folder: Path | None = None  # where unfinished videos lie; None: no videos
    video_every: int = 1  # of a task's episodes, film each so many-th
    annotate: bool = False  # draw instruction and outcome under the video's frames
    gifs: bool = False  # a GIF beside every video
    golden: bool = False  # the first process says how it draws the golden frame
    benchmark: Benchmark = field(default_factory=Libero)

    def start(self, parent: Parent, *, first: bool) -> None:
        """As Work says."""
        if not (first and self.golden):
            return
        try:
            found = self.benchmark.golden_frame()
        except Exception as error:  # the trials will tell whether the simulator works
            found = {"error": f"{type(error).__name__}: {error}"}
        parent.send("golden", found)

    def build(self, scene: tuple[str, int, int]) -> Simulator:
        """A simulator, with the sentence that the policy is given."""
        suite, task_id, env_seed = scene
        sim = self.benchmark.simulator(suite, task_id, env_seed=env_seed, quality=self.quality)
        if self.instruction != "keep":
            sim.instruction = instruction_given(self.benchmark, suite, task_id, self.instruction)
        return sim

    def play(self, sim: Simulator, job: Trial, parent: Parent) -> Outcome:
        """Play one trial. Crashed: it may go better when it is played again."""
        start, trial = time.monotonic(), job
        moved = None
        if sim.env_seed != PROTOCOL_SEED and self.policy != "replay":
            moved = moved_by_seed(sim, settle=self.settle)
        actor, film = self._actor(sim, trial, parent), self._film(sim, trial)

        def on_step(step: int, frame: np.ndarray | None) -> None:
            parent.alive()
            if film:
                film.add(sim.frame() if frame is None else frame, f"step {step}")

        with film or contextlib.nullcontext():
            episode = rollout(
                sim,
                actor,
                init_state=trial.start,
                seed=trial.reset_seed,
                max_steps=trial.max_steps or self.max_steps or self.benchmark.step_limit(trial.suite),
                settle=self.settle,
                num_open_loop_steps=self.num_open_loop_steps,
                recorder=lambda: self.benchmark.recorder(sim),
                on_step=on_step,
            )
            if episode.error and not episode.policys_fault:
                raise Crashed(episode.error)
            if film and episode.error is None:
                film.end(sim.frame(), f"{'success' if episode.success else 'failure'} after {episode.steps} steps")
        return Outcome(
            trial=trial,
            success=None if episode.error else episode.success,
            steps=episode.steps,
            seconds=time.monotonic() - start,
            error=episode.error,
            waited=parent.waited,
            actions=np.array(episode.actions, dtype=np.float32).reshape(-1, 7),
            video=film.path if film else None,
            diagnosis=diagnose(episode.trajectory, success=episode.success) if episode.error is None else None,
            near_ties=actor.near_ties if isinstance(actor, _ParentsPolicy) else [],
            instruction_given=None if self.instruction == "keep" else sim.instruction,
            moved_by_env_seed_mm=moved,
            replay=actor.result if isinstance(actor, RecordedActions) else None,
            process=os.getpid(),
            peak_memory=machine.peak_memory(),
        )

    def _actor(self, sim: Simulator, trial: Trial, parent: Parent) -> Actor:
        if self.policy == "parent":
            return _ParentsPolicy(self, parent)
        if self.policy == "expert":
            from prismatic.expert import Expert

            return Expert(sim)
        if self.policy == "replay":
            assert isinstance(trial, RecordedEpisode)
            return RecordedActions(sim, trial)
        return _Control(self.policy, self.seed, trial)

    def _film(self, sim: Simulator, trial: Trial) -> Film | None:
        if self.video_folder is None or trial.init_state % self.video_every:
            return None
        path = self.video_folder / f"{os.getpid()}.mp4"
        return Film(path, caption=sim.instruction if self.annotate else None, gif=self.gifs)
