"""A benchmark for fast tests: a point on a line that must be pushed to a goal. No torch here: simulator processes import it.

The start depends on (task, state, seed). action[0] > 0 moves it on; the frame's brightness says where it is.
Trouble is ordered through a folder named by FAKE_TROUBLE: a file "<task>-<state>" holding "<kind> <times>"
makes that many attempts at the episode "die", "hang" or "raise" in their third step ("die-build": while the
simulator is being built).
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.errors import ConfigError
from prismatic.scene import renderer
from prismatic.scene.trajectory import Goal, Place, Trajectory

STATES, TASKS, LIMIT, SIDE = 8, 3, 12, 32
GOAL = 200.0


class FakeBenchmark:
    """A Benchmark of one suite, "fake"."""

    def num_tasks(self, suite: str) -> int:
        if suite != "fake":
            raise ConfigError(f"unknown suite {suite!r}: there are fake")
        return TASKS

    def instruction(self, suite: str, task_id: int) -> str:
        return f"push the point to the goal, {task_id}."

    def num_init_states(self, suite: str, task_id: int) -> int:
        if not 0 <= task_id < self.num_tasks(suite):
            raise ConfigError(f"{suite} has no task {task_id}")
        return STATES

    def step_limit(self, suite: str) -> int:
        return LIMIT

    def files_fingerprint(self, suite: str) -> str:
        return "0123456789abcdef"

    def simulator(self, suite: str, task_id: int, *, env_seed: int = 0, quality: str = "standard") -> "FakeSimulator":
        return FakeSimulator(suite, task_id, env_seed=env_seed, quality=quality)

    def recorder(self, sim: Any) -> "FakeRecorder":
        return FakeRecorder(sim)

    def golden_frame(self) -> dict[str, Any]:
        return renderer.compare_with_golden(np.zeros((256, 256, 3), np.uint8), "osmesa") | {"gl_renderer": "none"}


class FakeSimulator:
    def __init__(self, suite: str, task_id: int, *, env_seed: int = 0, quality: str = "standard") -> None:
        self.suite, self.task_id = suite, task_id
        self.instruction, self.env_seed, self.quality = FakeBenchmark().instruction(suite, task_id), env_seed, quality
        log = os.environ.get("FAKE_LOG")
        if log:
            with open(log, "a") as stream:
                threads = [f"{name}={os.environ.get(name)}" for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS")]
                stream.write(f"{os.getpid()} built {task_id} {' '.join(threads)}\n")
        _trouble(task_id, None)

    def reset(self, init_state: Any, *, seed: int | None = None, settle: int = 10) -> None:
        init_state = seed if init_state is None else int(np.ravel(init_state)[0])
        self.init_state, self.steps, self.rendered = init_state, 0, 0
        self.place = 10.0 * init_state + 7.0 * self.task_id + self.env_seed

    def step(self, action: np.ndarray) -> bool:
        self.steps += 1
        if self.steps == 3:
            _trouble(self.task_id, self.init_state)
        self.place += 20.0 * float(action[0])
        return self.place >= GOAL

    def frame(self) -> np.ndarray:
        self.rendered += 1
        return np.full((SIDE, SIDE, 3), int(np.clip(self.place, 0, 255)), np.uint8)

    def wrist(self) -> np.ndarray:
        return np.full((SIDE, SIDE, 3), int(np.clip(self.place, 0, 255)) // 2, np.uint8)

    def places(self) -> dict[str, np.ndarray]:
        """The point starts where the state and the seed say, the goal stands still."""
        upright = [1, 0, 0, 0]
        return {"point": np.array([self.place / 1000, 0, 0, *upright]), "goal": np.array([0, 0, 0, *upright])}

    def state(self) -> np.ndarray:
        return np.array([self.place / 1000, *[0.0] * 7], np.float32)

    def close(self) -> None:
        pass


class ScriptedSimulator:
    """What collecting asks of a simulator. It keeps the commands; solved: whether the task is solved after so many of them."""

    suite, task_id, instruction = "libero_spatial", 0, "wait"

    def __init__(self, solved: Callable[[int], bool]) -> None:
        self.solved, self.commands, self.rendered, self.shown = solved, [], 0, 0
        self.started_from: Any = None

    def reset(self, state: np.ndarray | None, *, seed: int | None = None) -> None:
        self.started_from = seed if state is None else state

    def step(self, action: np.ndarray) -> bool:
        self.commands.append(np.asarray(action))
        self.shown = len(self.commands)
        return self.solved(self.shown)

    def moment(self) -> list[np.ndarray]:
        return [np.array(self.shown)]

    def show(self, moment: list[np.ndarray]) -> None:
        self.shown = int(moment[0])

    def frame(self) -> np.ndarray:
        self.rendered += 1
        return np.full((16, 16, 3), 20 * self.shown % 256, np.uint8)

    wrist = frame

    def state(self) -> np.ndarray:
        return np.zeros(8, np.float32)

    def joint_angles(self) -> np.ndarray:
        return np.zeros(7, np.float32)


class FakeRecorder:
    """The point is an object that a hand above it pushes to a zone; a frame's grey level is a millimetre."""

    def __init__(self, sim: FakeSimulator) -> None:
        self.sim, self.places = sim, [sim.place]

    def note(self, action: np.ndarray) -> None:
        self.places.append(self.sim.place)

    def trajectory(self) -> Trajectory:
        count = len(self.places)
        places = np.zeros((count, 1, 3))
        places[:, 0, 0] = np.array(self.places) / 1000
        touch = np.zeros((count, 1, 3), dtype=bool)
        touch[1:, 0, 2] = True
        zone = Place(owner=None, outline=np.full(3, 0.01), room=np.full(3, 0.01))
        return Trajectory(
            goals=[Goal("on", "point_1", "goal_region", zone)],
            objects=["point_1"],
            parts=[],
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
