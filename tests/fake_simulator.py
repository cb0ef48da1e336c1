"""A simulator for fast tests, with prismatic.simulator's names: a point on a line that must be pushed to a
goal.

The start depends on (task, state, seed). action[0] > 0 moves it on; the frame's brightness says where it is.
Trouble is ordered through a folder named by FAKE_TROUBLE: a file "<task>-<state>" holding "<kind> <times>"
makes that many attempts at the episode "die", "hang" or "raise" in their third step ("die-build": while the
simulator is being built).
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.errors import ConfigError
from prismatic.scene.stages import Goal, Signals, Target
from prismatic.simulator import rollout as rollout  # the real loop

STATES, TASKS, LIMIT, SIDE = 8, 3, 12, 32
GOAL = 200.0
CLOSE_CALLS = 37  # a frame's level that is a multiple of it is a close call for CloseCallPolicy


def choose_renderer() -> str:
    return "none"


def num_tasks(suite: str) -> int:
    if suite != "fake":
        raise ConfigError(f"unknown suite {suite!r}: there are fake")
    return TASKS


def instruction(suite: str, task_id: int) -> str:
    return f"push the point to the goal, {task_id}."


def num_init_states(suite: str, task_id: int) -> int:
    if not 0 <= task_id < num_tasks(suite):
        raise ConfigError(f"{suite} has no task {task_id}")
    return STATES


def step_limit(suite: str) -> int:
    return LIMIT


def render_options(quality: str) -> dict[str, int]:
    return {"resolution": SIDE}


def golden_frame() -> np.ndarray:
    return np.zeros((256, 256, 3), np.uint8)


class Simulator:
    def __init__(
        self,
        suite: str,
        task_id: int,
        *,
        cameras: tuple[str, ...],
        env_seed: int = 0,
        quality: str = "standard",
    ) -> None:
        self.suite, self.task_id, self.cameras = suite, task_id, cameras
        self.instruction, self.env_seed, self.quality = instruction(suite, task_id), env_seed, quality
        log = os.environ.get("FAKE_LOG")
        if log:
            with open(log, "a") as stream:
                threads = [f"{name}={os.environ.get(name)}" for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS")]
                stream.write(f"{os.getpid()} built {task_id} {' '.join(threads)}\n")
        _trouble(task_id, None)

    def reset(self, init_state: Any, *, seed: int | None = None, settle: int = 10) -> None:
        init_state = seed if init_state is None else int(np.ravel(init_state)[0])
        self.init_state, self.steps = init_state, 0
        self.place = 10.0 * init_state + 7.0 * self.task_id + self.env_seed

    def step(self, action: np.ndarray) -> bool:
        self.steps += 1
        if self.steps == 3:
            _trouble(self.task_id, self.init_state)
        self.place += 20.0 * float(action[0])
        return self.place >= GOAL

    def witness(self) -> "Witness":
        return Witness(self)

    def frame(self) -> np.ndarray:
        return np.full((SIDE, SIDE, 3), int(np.clip(self.place, 0, 255)), np.uint8)

    def wrist(self) -> np.ndarray:
        return self.frame() // 2

    def places(self) -> dict[str, np.ndarray]:
        """The point starts where the state and the seed say, the goal stands still."""
        upright = [1, 0, 0, 0]
        return {"point": np.array([self.place / 1000, 0, 0, *upright]), "goal": np.array([0, 0, 0, *upright])}

    def proprio(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array([self.place / 1000, *[0.0] * 7], np.float32), np.zeros(7, np.float32)

    def close(self) -> None:
        pass


class Witness:
    """The point is an object that a hand above it pushes to a zone; a frame's grey level is a millimetre."""

    def __init__(self, sim: Simulator) -> None:
        self.sim, self.places = sim, [sim.place]

    def note(self, action: np.ndarray) -> None:
        self.places.append(self.sim.place)

    def signals(self) -> Signals:
        count = len(self.places)
        places = np.zeros((count, 1, 3))
        places[:, 0, 0] = np.array(self.places) / 1000
        touch = np.zeros((count, 1, 3), dtype=bool)
        touch[1:, 0, 2] = True
        return Signals(
            goals=[Goal("on", "point_1", "goal_region")],
            objects=["point_1"],
            parts=[],
            targets=[Target(owner=None, outline=np.full(3, 0.01), room=np.full(3, 0.01))],
            ways=[None],
            centre=np.zeros((1, 3)),
            half=np.zeros((1, 3)),
            hand=places[:, 0] + np.array([0, 0, 0.1]),
            opening=np.full(count, 0.08),
            closing=np.zeros(count, dtype=bool),
            places=places,
            upright=np.tile([0.0, 0.0, 1.0], (count, 1, 1)),
            touch=touch,
            offset=places - np.array([GOAL / 1000, 0, 0]),
            values=np.zeros((count, 0)),
            part_gap=np.zeros((count, 0)),
            held=np.array(self.places)[:, None] >= GOAL,
            supports=[[]],
        )


def _trouble(task_id: int, init_state: int | None) -> None:
    name = f"{task_id}-{'build' if init_state is None else init_state}"
    order = Path(os.environ.get("FAKE_TROUBLE", "/nonexistent")) / name
    if not order.is_file():
        return
    kind, times = order.read_text().split()
    if int(times) <= 0:
        return
    order.write_text(f"{kind} {int(times) - 1}")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(600)
    if kind == "raise":
        raise ValueError("the physics exploded")


class CloseCallPolicy:
    """Two actions that are equally good at some frames: there, as with rounding, the batch size decides, and it says so."""

    num_images = 1

    def batch(self, frames: list[np.ndarray], instructions: list[str], wrists: Any = None) -> np.ndarray:
        places = np.array([float(frame[0, 0, 0]) for frame in frames])
        close = places % CLOSE_CALLS == 0
        self.last_margins = np.where(close, 1e-6, 1.0)
        actions = np.zeros((len(frames), 7), np.float32)
        actions[:, 0] = np.where(close & (len(frames) > 1), 0.65, 0.55)
        return actions


class BrightnessPolicy:
    """Acts on the frames alone. Some start states are too far from the goal for it: they fail."""

    def __init__(self, num_images: int = 1) -> None:
        self.num_images = num_images
        self.batch_sizes: list[int] = []

    def batch(
        self, frames: list[np.ndarray], instructions: list[str], wrists: list[np.ndarray] | None = None
    ) -> np.ndarray:
        assert (wrists is not None) == (self.num_images > 1)
        self.batch_sizes.append(len(frames))
        actions = np.zeros((len(frames), 7), np.float32)
        for row, frame in enumerate(frames):
            actions[row, 0] = 0.5 + frame[0, 0, 0] / 510
        return actions

    def card(self) -> dict[str, str]:
        return {"decode": "brightness"}
