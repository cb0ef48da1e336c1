"""How fast is an evaluation? In: a checkpoint and a task. Out: a row each for one simulator alone and for several side by side.

Every process has one core (LP_NUM_THREADS=0, one torch thread); the row "renderer's threads" is one simulator whose software
renderer uses all cores, as it does unless told otherwise. Starting the processes and building the simulators is not counted:
the clock runs from the beginning of the first episode to the end of the last. All episodes are cut off at the same step.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from prismatic import machine
from prismatic.episodes import pool
from prismatic.episodes.player import Outcome, Play
from prismatic.episodes.session import Session
from prismatic.episodes.trials import Trial, TrialQueue
from prismatic.scene.renderer import choose_renderer
from prismatic.scene.suites import instruction
from prismatic.simulator import RESOLUTION

RENDERER_THREADS = "LP_NUM_THREADS"
ONE_CORE, THREADED = "one core a process", "renderer's threads"


def run(
    checkpoint: str, *, suite: str, task_id: int, workers: Sequence[int], episodes: int, steps: int, quality: str
) -> list[dict[str, Any]]:
    """One row for a simulator alone, one for it with its renderer's threads, one for each number of workers."""
    import torch

    from prismatic.checkpoint import load_policy

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    choose_renderer()  # once, for all simulators
    policy = load_policy(checkpoint)
    _warm(policy, instruction(suite, task_id), max(workers, default=1))
    play = Play(
        num_images=policy.num_images,
        uses_state=policy.uses_state,
        prepare=policy.processor.image_path,
        quality=quality,
        max_steps=steps,
    )
    count = max(episodes, *workers)
    trials = [Trial(suite=suite, task_id=task_id, init_state=state, env_seed=0) for state in range(count)]
    cases = [(ONE_CORE, 1), (THREADED, 1), *((ONE_CORE, number) for number in workers if number > 1)]
    return compare([measure(trials, play, policy, rendering=rendering, workers=number) for rendering, number in cases])


def _warm(policy: Any, words: str, rows: int) -> None:
    """Answer batches of every size that its decoder knows: on a GPU the first of each compiles and records, for minutes."""
    picture = np.zeros((RESOLUTION, RESOLUTION, 3), np.uint8)
    size = 1
    while size < 2 * rows:
        policy.batch([picture] * size, [words] * size, wrists=[picture] * size if policy.num_images == 2 else None)
        size *= 2


def measure(trials: Sequence[Trial], play: Play, policy: Any, *, rendering: str, workers: int) -> dict[str, Any]:
    """Play the trials once. busy: share of the time in which the policy, or a simulator on average, was at work."""
    session = Session(policy, workers=workers)
    ended: list[tuple[float, Outcome]] = []
    with _renderer_threads(0 if rendering == ONE_CORE else machine.available_cores()):
        for end in pool.run(TrialQueue(trials), play, num_workers=workers, answer=session.answer):
            if end.error:
                raise RuntimeError(f"{end.job.id}: {end.error}")
            ended.append((time.monotonic(), end.result))
    span = max(end for end, _ in ended) - min(end - outcome.seconds for end, outcome in ended)
    simulating = sum(outcome.seconds - outcome.waited for _, outcome in ended)
    return {
        "rendering": rendering,
        "workers": workers,
        "episodes": len(ended),
        "steps": sum(outcome.steps for _, outcome in ended),
        "seconds": round(span, 3),
        "episodes an hour": round(3600 * len(ended) / span, 1),
        "policy busy": round(sum(session.seconds) / span, 3),
        "simulator busy": round(simulating / (workers * span), 3),
        "mean batch": round(session.rows / len(session.seconds), 2),
    }


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their speed against one simulator alone, and against one with its renderer's threads."""

    def rate(rendering: str) -> float:
        return next(row["episodes an hour"] for row in rows if (row["rendering"], row["workers"]) == (rendering, 1))

    return [
        row
        | {
            "x one core": round(row["episodes an hour"] / rate(ONE_CORE), 2),
            "x threads": round(row["episodes an hour"] / rate(THREADED), 2),
        }
        for row in rows
    ]


@contextlib.contextmanager
def _renderer_threads(number: int) -> Iterator[None]:
    """For simulator processes that start while it lasts; 0: they draw on the thread that asks."""
    before = os.environ.get(RENDERER_THREADS)
    os.environ[RENDERER_THREADS] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ[RENDERER_THREADS]
        else:
            os.environ[RENDERER_THREADS] = before
