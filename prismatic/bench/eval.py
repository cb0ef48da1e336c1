"""How fast is an evaluation? In: a checkpoint and a task. Out: a row each for one simulator alone and for several side by side.

Every process has one core (LP_NUM_THREADS=0, one torch thread); in the row "renderer's threads" one simulator's software renderer uses all
cores, as it does unless told otherwise. Starting the processes and building the simulators is not counted: the clock runs from the beginning of
the first episode to the end of the last. All episodes are cut off at the same step.
"""

import os
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np

from prismatic import machine
from prismatic.bench.instruments import Row
from prismatic.episodes import pool
from prismatic.episodes.player import Outcome, Play
from prismatic.episodes.session import Session
from prismatic.episodes.trials import Trial, TrialQueue
from prismatic.scene.renderer import choose_renderer
from prismatic.scene.suites import instruction
from prismatic.simulator import RESOLUTION

ONE_CORE, THREADED = "one core a process", "renderer's threads"


def run(
    checkpoint: str,
    *,
    task_suite_name: str,
    task_id: int,
    episodes: int,
    steps: int,
    render_quality: str,
    workers: Sequence[int],
) -> list[Row]:
    """One row for a simulator alone, one for it with its renderer's threads, one for each number of workers."""
    import torch

    from prismatic.checkpoint import load_policy
    from prismatic.models.compiled import batches

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    choose_renderer()  # once, for all simulators
    policy: Any = load_policy(checkpoint)
    image, said = np.zeros((RESOLUTION, RESOLUTION, 3), np.uint8), instruction(task_suite_name, task_id)
    states = [np.zeros(8, np.float32)] if policy.uses_state else None
    # on a GPU the first batch of a size compiles, for minutes, and the second records
    sizes = sorted({size for rows in range(1, max(workers) + 1) for size in batches(rows)}, reverse=True)
    for size in [size for size in sizes for _ in range(3 if torch.cuda.is_available() else 1)]:
        wrists = [image] * size if policy.num_images == 2 else None
        policy.batch_chunks([image] * size, [said] * size, wrists, states and states * size)
    play = Play(
        num_images=policy.num_images,
        uses_state=policy.uses_state,
        prepare=policy.processor.image_path,
        quality=render_quality,
        max_steps=steps,
    )
    count = max(episodes, *workers)
    trials = [Trial(suite=task_suite_name, task_id=task_id, init_state=state, env_seed=0) for state in range(count)]
    cases = [(ONE_CORE, 1), (THREADED, 1), *((ONE_CORE, number) for number in workers if number > 1)]
    rows = [measure(trials, play, policy, rendering=rendering, workers=number) for rendering, number in cases]
    for row in rows:
        for name, alone in zip(("x one core", "x threads"), rows, strict=False):
            row[name] = round(row["episodes an hour"] / alone["episodes an hour"], 2)
    return rows


def measure(trials: Sequence[Trial], play: Play, policy: Any, *, rendering: str, workers: int) -> Row:
    """Play the trials once. busy: share of the time in which the policy, or a simulator on average, was at work."""
    session = Session(policy, workers=workers)
    ended: list[tuple[float, Outcome]] = []
    threads = {"LP_NUM_THREADS": str(0 if rendering == ONE_CORE else machine.available_cores())}
    with mock.patch.dict(os.environ, threads):  # of the simulator processes that start meanwhile
        for end in pool.Pool(TrialQueue(trials).next_job, play, workers, session.answer).run():
            if end.error:
                raise RuntimeError(f"{end.job.id}: {end.error}")
            ended.append((time.monotonic(), end.result))
    span = max(end for end, _ in ended) - min(end - outcome.row.seconds for end, outcome in ended)
    simulating = sum(outcome.row.seconds - outcome.waited for _, outcome in ended)
    return {
        "rendering": rendering,
        "workers": workers,
        "episodes": len(ended),
        "steps": sum(outcome.row.steps for _, outcome in ended),
        "seconds": round(span, 3),
        "episodes an hour": round(3600 * len(ended) / span, 1),
        "policy busy": round(sum(session.seconds) / span, 3),
        "simulator busy": round(simulating / (workers * span), 3),
        "mean batch": round(session.rows / len(session.seconds), 2),
    }
