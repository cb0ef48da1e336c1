"""What a simulator process does with a trial: plays it, films it, says why it ended so.

What a trial gives depends on its id alone, not on the process, nor on the trials before it. A learned policy lives in the parent and is
asked over the pipe; the expert, recorded actions and the controls ("zero", "random") act here, beside the simulator.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from prismatic import machine
from prismatic.episodes.controls import PROTOCOL_SEED, instruction_given, moved_by_seed
from prismatic.episodes.film import Film
from prismatic.episodes.pool import Parent
from prismatic.episodes.recorded import RecordedActions
from prismatic.episodes.result import EpisodeResult
from prismatic.episodes.trials import Trial
from prismatic.observation import Observation
from prismatic.rollout import Actor, Simulator, rollout
from prismatic.scene.diagnosis import diagnose
from prismatic.scene.suites import Benchmark, Libero

# Simulator → what its env seed moved: two resets, once a scene.
_MOVED: WeakKeyDictionary[Simulator, dict[str, float]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: its row of results.jsonl, but for the names of files, and what goes into the files."""

    row: EpisodeResult
    actions: np.ndarray | None = None  # (steps, 7) float32
    video: Path | None = None  # under its temporary name
    waited: float = 0.0  # of the row's seconds, those spent waiting for the parent's policy
    process: int = 0  # that played it
    peak_memory: int = 0  # bytes, of that process so far


class _ParentsPolicy:
    """The parent's policy, asked over the pipe."""

    def __init__(self, play: "Play", parent: Parent) -> None:
        self.num_images, self.uses_state = play.num_images, play.uses_state
        self._prepare, self._parent = play.prepare or (lambda image: image), parent

    def chunk(self, frame: Any, instruction: str, wrist: Any = None, state: Any = None) -> np.ndarray:
        image, second = (None if one is None else self._prepare(one) for one in (frame, wrist))
        answer = self._parent.ask(Observation(image, instruction, second, state))
        if isinstance(answer, Exception):
            raise answer
        return answer


class _Control:
    """The floor of a score: "zero" holds still with the gripper open, "random" draws each number uniformly."""

    num_images, uses_state = 0, False

    def __init__(self, kind: str, seed: int, trial: Trial) -> None:
        self.kind, self.generator = kind, np.random.default_rng([seed, *trial.id.encode()])

    def chunk(self, frame: Any, instruction: str, wrist: Any = None, state: Any = None) -> np.ndarray:
        if self.kind == "zero":
            return np.array([[0, 0, 0, 0, 0, 0, 1]], dtype=np.float32)
        return self.generator.uniform([-1] * 6 + [0], 1).astype(np.float32)[None]


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
        """Play one trial. Whatever is raised may pass when it is played again."""
        start, recording = time.monotonic(), job.recording
        limit = len(recording.actions) if recording else self.max_steps or self.benchmark.step_limit(job.suite)
        if sim.env_seed != PROTOCOL_SEED and not recording and sim not in _MOVED:
            _MOVED[sim] = moved_by_seed(sim, settle=self.settle)
        actor, film = self._actor(sim, job, parent), self._film(sim, job)

        def on_step(step: int, frame: np.ndarray | None) -> None:
            parent.alive()
            if film:
                film.add(sim.frame() if frame is None else frame, f"step {step}")

        with film or contextlib.nullcontext():
            episode = rollout(
                sim,
                actor,
                init_state=recording.start if recording else job.init_state,
                seed=recording and recording.seed,
                max_steps=limit,
                settle=self.settle,
                num_open_loop_steps=self.num_open_loop_steps,
                recorder=lambda: self.benchmark.recorder(sim),
                on_step=on_step,
            )
            steps = len(episode.actions)
            if film and episode.error is None:
                film.end(sim.frame(), f"{'success' if episode.success else 'failure'} after {steps} steps")
        actions = np.array(episode.actions, dtype=np.float32).reshape(-1, 7)
        facts: dict[str, Any] = {
            "steps": steps,
            "actions_sha256": hashlib.sha256(actions.tobytes()).hexdigest()[:16],
            "instruction_given": None if self.instruction == "keep" else sim.instruction,
            "moved_by_env_seed_mm": _MOVED.get(sim),
            "replay": actor.result if isinstance(actor, RecordedActions) else None,
        }
        if episode.error is None:
            diagnosis = diagnose(episode.trajectory, success=episode.success)
            facts |= {"success": episode.success, **vars(diagnosis)}
        return Outcome(
            self.row(job, seconds=time.monotonic() - start, error=episode.error, **facts),
            actions=actions,
            video=film.path if film and episode.error is None else None,
            waited=parent.waited,
            process=os.getpid(),
            peak_memory=machine.peak_memory(),
        )

    def row(self, trial: Trial, *, seconds: float, error: str | None, **facts: Any) -> EpisodeResult:
        """A trial's row of results.jsonl; without more facts, that of an episode which crashed."""
        error = error and error.encode(errors="replace").decode()  # a path in it may hold any byte
        left_out = facts.get("replay") and facts["replay"].left_out
        why = "Left out: it does not begin as it was recorded." if left_out else f"The episode crashed: {error}"
        crashed = {"success": None, "steps": 0, "verdict": "error", "reason": why}
        return EpisodeResult(
            episode_id=trial.id,
            suite=trial.suite,
            task_id=trial.task_id,
            init_state=trial.init_state,
            env_seed=trial.env_seed,
            instruction=self.benchmark.instruction(trial.suite, trial.task_id),
            seconds=seconds,
            error=error,
            **crashed | facts,
        )

    def _actor(self, sim: Simulator, trial: Trial, parent: Parent) -> Actor:
        if self.policy == "parent":
            return _ParentsPolicy(self, parent)
        if self.policy == "expert":
            from prismatic.expert import Expert

            return Expert(sim)
        if self.policy == "replay":
            assert trial.recording
            return RecordedActions(sim, trial.recording)
        return _Control(self.policy, self.seed, trial)

    def _film(self, sim: Simulator, trial: Trial) -> Film | None:
        if self.video_folder is None or trial.init_state % self.video_every:
            return None
        path = self.video_folder / f"{os.getpid()}.mp4"
        return Film(path, caption=sim.instruction if self.annotate else None)
