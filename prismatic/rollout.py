"""One episode: a simulator and who acts in it come in; success, steps and actions come out.

An actor answers a chunk of actions; the next image is rendered when the chunk has been executed, so most steps draw nothing.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from prismatic.errors import PolicyError


class Simulator(Protocol):
    """One task; each `reset` starts an episode. Frames are (H, W, 3) uint8, upright."""

    suite: str
    task_id: int
    env_seed: int
    instruction: str
    quality: str

    def reset(self, init_state: int | np.ndarray | None, *, seed: int | None = None, settle: int = 10) -> None: ...
    def step(self, action: np.ndarray) -> bool: ...
    def frame(self) -> np.ndarray: ...
    def wrist(self) -> np.ndarray: ...
    def state(self) -> np.ndarray: ...
    def places(self) -> dict[str, np.ndarray]: ...
    def close(self) -> None: ...


class Actor(Protocol):
    """Who acts in one episode, a policy or a scripted expert. num_images: 0 reads no image, 1 the front camera, 2 also the wrist's."""

    @property
    def num_images(self) -> int: ...
    @property
    def uses_state(self) -> bool: ...
    def chunk(
        self,
        frame: np.ndarray | None,
        instruction: str,
        wrist: np.ndarray | None = None,
        state: np.ndarray | None = None,
    ) -> np.ndarray:
        """(K, 7) actions to be executed one after the other."""
        ...


class Recorder(Protocol):
    """Watches an episode: `note` after each step, `trajectory` at the end."""

    def note(self, action: np.ndarray) -> None: ...
    def trajectory(self) -> Any: ...


@dataclass
class Episode:
    """What came of one episode. `error`: the policy's answer was no action, which is no failure."""

    success: bool = False
    actions: list[np.ndarray] = field(default_factory=list)  # (7,) each
    error: str | None = None
    trajectory: Any = None  # the recorder's, unless there is an error


def rollout(
    sim: Simulator,
    actor: Actor,
    *,
    init_state: int | np.ndarray | None,
    seed: int | None = None,
    max_steps: int,
    settle: int = 10,
    num_open_loop_steps: int | None = None,
    recorder: Callable[[], Recorder] | None = None,
    on_step: Callable[[int, np.ndarray | None], None] | None = None,
) -> Episode:
    """Let the actor act until success or `max_steps`, from an initial state as `Simulator.reset` takes it.

    num_open_loop_steps: execute only the first so many actions of each chunk (None: all). recorder: makes one, after the reset.
    on_step(step, frame): called before each step, with the frame where one has been rendered for the actor. What else than the policy
    breaks is raised: it may go better when the episode is played again.
    """
    episode = Episode()
    try:
        sim.reset(init_state, seed=seed, settle=settle)
        watching = recorder() if recorder else None
        queue: deque[np.ndarray] = deque()
        while len(episode.actions) < max_steps and not episode.success:
            frame = None
            if not queue:
                frame = sim.frame() if actor.num_images else None
                wrist = sim.wrist() if actor.num_images > 1 else None
                state = sim.state() if actor.uses_state else None
                queue.extend(actor.chunk(frame, sim.instruction, wrist=wrist, state=state)[:num_open_loop_steps])
            if on_step:
                on_step(len(episode.actions), frame)
            action = queue.popleft()
            episode.success = sim.step(action)
            if watching:
                watching.note(action)
            episode.actions.append(action)
        episode.trajectory = watching.trajectory() if watching else None
    except PolicyError as error:
        episode.error = f"{type(error).__name__}: {error}"
    return episode
