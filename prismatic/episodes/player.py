"""What runs in a simulator process: one trial at a time in, its outcome out.

What a trial gives depends on its id alone, not on the process, nor on the trials before it. A learned policy
lives in the parent and is asked over the pipe; the expert and the controls ("zero", "random") act here,
beside the simulator.
"""

import contextlib
import ctypes
import importlib
import os
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from prismatic import machine
from prismatic.episodes.controls import PROTOCOL_SEED, instruction_given, moved_by_seed
from prismatic.episodes.recording import Recording
from prismatic.errors import ConfigError
from prismatic.scene import golden
from prismatic.scene.verdicts import Account, account

HEARTBEAT = 1.0  # s between signs of life of a process that needs no answers
PR_SET_PDEATHSIG = 1  # Linux prctl: be sent a signal when the parent dies


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


@dataclass(frozen=True)
class Setup:
    """What all processes of a run are told once. It is pickled, so it holds names and values only."""

    policy: str = "parent"  # "parent": ask over the pipe; "expert", "replay", "zero", "random": act inside the process
    num_images: int = 1  # that the parent's policy looks at: 2 adds the wrist camera
    settle: int = 10  # steps of holding still before the first action
    seed: int = 0  # of the random policy
    quality: str = "standard"
    instruction: str = "keep"  # what the policy is told: see controls.instruction_given
    max_steps: int | None = None  # a limit below the suite's, for measuring speed
    video_folder: Path | None = None  # where unfinished videos lie; None: no videos
    annotate: bool = False  # draw instruction and outcome under the video's frames
    gifs: bool = False  # a GIF beside every video
    golden: bool = False  # first tell how this process draws the golden frame
    simulator: str = "prismatic.simulator"  # the module: Simulator, rollout, step_limit, golden_frame


@dataclass(frozen=True)
class Outcome:
    """What came of a trial. success is None when there is an error: a crash says nothing about the policy."""

    trial: Trial
    success: bool | None
    steps: int
    seconds: float
    error: str | None = None
    retry: bool = True  # whether an error may pass when the trial is played again
    waited: float = 0.0  # of the seconds, those spent waiting for the parent's policy
    actions: np.ndarray | None = None  # (steps, 7) float32
    video: Path | None = None  # under its temporary name
    account: Account | None = None  # why it ended so; None: an error
    facts: dict[str, Any] = field(default_factory=dict)  # more fields of its line in results.jsonl; JSON values
    process: int = 0  # that played it
    peak_memory: int = 0  # bytes, of that process so far


class _FromParent:
    """The parent's policy, asked over the pipe."""

    def __init__(self, connection: Connection, num_images: int) -> None:
        self.connection, self.num_images = connection, num_images
        self.waited = 0.0  # s

    def __call__(self, frame: np.ndarray, instruction: str, wrist: np.ndarray | None = None) -> np.ndarray:
        asked = time.monotonic()
        self.connection.send(("observation", (frame, instruction, wrist)))
        action = self.connection.recv()
        self.waited += time.monotonic() - asked
        return action


class _Control:
    """The floor of a score: "zero" holds still with the gripper open, "random" draws each number uniformly."""

    num_images = 0

    def __init__(self, kind: str, seed: int, trial: Trial) -> None:
        self.kind = kind
        self.generator = np.random.default_rng([seed, *trial.id.encode()])

    def __call__(self, frame: Any, instruction: str, wrist: Any = None) -> np.ndarray:
        if self.kind == "zero":
            return np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.float32)
        motion, gripper = self.generator.uniform(-1, 1, size=6), self.generator.uniform(0, 1, size=1)
        return np.concatenate([motion, gripper]).astype(np.float32)


class _Alive:
    """Wraps a policy that acts inside the process, and tells the parent now and then that it still does."""

    def __init__(self, policy: Any, connection: Connection) -> None:
        self.policy, self.connection, self.told = policy, connection, time.monotonic()
        self.num_images = getattr(policy, "num_images", 1)

    def __call__(self, frame: Any, instruction: str, wrist: Any = None) -> np.ndarray:
        if time.monotonic() - self.told > HEARTBEAT:
            self.connection.send(("alive", None))
            self.told = time.monotonic()
        return self.policy(frame, instruction, wrist=wrist)


def _policy(setup: Setup, sim: Any, trial: Trial, connection: Connection) -> Any:
    if setup.policy == "parent":
        return _FromParent(connection, setup.num_images)
    if setup.policy == "expert":
        from prismatic.expert import Expert

        return _Alive(Expert(sim), connection)
    if setup.policy == "replay":
        from prismatic.episodes.recorded import Demo, Recorded

        assert isinstance(trial, Demo)
        return _Alive(Recorded(sim, trial), connection)
    return _Alive(_Control(setup.policy, setup.seed, trial), connection)


def _play(simulator: Any, sim: Any, trial: Trial, setup: Setup, connection: Connection) -> Outcome:
    start = time.monotonic()
    policy = _policy(setup, sim, trial, connection)
    video = None
    if setup.video_folder:
        path = setup.video_folder / f"{os.getpid()}.mp4"
        video = Recording(path, caption=sim.instruction if setup.annotate else None, gif=setup.gifs)
    with video or contextlib.nullcontext():
        episode = simulator.rollout(
            sim,
            policy,
            init_state=trial.start,
            seed=trial.reset_seed,
            max_steps=trial.max_steps or setup.max_steps or simulator.step_limit(trial.suite),
            settle=setup.settle,
            on_step=(lambda step, frame, action: video.add(frame, f"step {step}")) if video else None,
        )
        if video and episode.error is None:
            video.end(sim.frame(), f"{'success' if episode.success else 'failure'} after {episode.steps} steps")
    actor = getattr(policy, "policy", policy)
    actions = np.array(episode.actions, dtype=np.float32).reshape(-1, 7)
    return Outcome(
        trial=trial,
        success=None if episode.error else bool(episode.success),
        steps=episode.steps,
        seconds=time.monotonic() - start,
        error=episode.error,
        retry=getattr(actor, "retry", True),
        waited=getattr(actor, "waited", 0.0),
        actions=actions,
        video=video.path if video else None,
        account=account(episode.signals, success=episode.success) if episode.signals else None,
        process=os.getpid(),
        peak_memory=machine.peak_memory(),
        facts=dict(getattr(actor, "facts", {})),
    )


def _scene_facts(simulator: Any, sim: Any, setup: Setup) -> dict[str, Any]:
    """What every episode of a scene says about it: another sentence than the task's, another seed than the protocol's."""
    facts: dict[str, Any] = {}
    if setup.instruction != "keep":
        sim.instruction = instruction_given(simulator, sim.suite, sim.task_id, setup.instruction)
        facts["instruction_given"] = sim.instruction
    if sim.env_seed != PROTOCOL_SEED and setup.policy != "replay":
        facts["moved_by_env_seed_mm"] = moved_by_seed(sim, settle=setup.settle)
    return facts


def _golden_card(simulator: Any) -> dict[str, Any]:
    try:
        return golden.card(simulator.golden_frame(), simulator.choose_renderer())
    except Exception as error:  # the trials will tell whether the simulator works
        return {"error": f"{type(error).__name__}: {error}"}


def serve(connection: Connection, setup: Setup) -> None:
    """A simulator process: plays the trials it is sent, until the parent is gone or something breaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # writing a video unblocks what the parent has blocked for us
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    simulator = importlib.import_module(setup.simulator)
    cameras = ("agentview", "robot0_eye_in_hand")[: max(1, setup.num_images)]
    sim: Any = None
    scene: tuple[str, int, int] | None = None
    facts: dict[str, Any] = {}
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        if setup.golden:
            connection.send(("golden", _golden_card(simulator)))
        while True:
            trial: Trial = connection.recv()
            try:
                if scene != trial.scene:
                    if sim is not None:
                        sim.close()
                    suite, task_id, env_seed = scene = trial.scene
                    sim = simulator.Simulator(suite, task_id, cameras=cameras, env_seed=env_seed, quality=setup.quality)
                    facts = _scene_facts(simulator, sim, setup)
                    connection.send(("built", None))
                outcome = _play(simulator, sim, trial, setup, connection)
                outcome.facts.update(facts)
            except ConfigError as error:
                connection.send(("refused", str(error)))
                return
            except Exception as error:
                connection.send(("crashed", f"{type(error).__name__}: {error}"))
                return
            if outcome.error and outcome.retry:
                connection.send(("crashed", outcome.error))
                return
            connection.send(("outcome", outcome))
