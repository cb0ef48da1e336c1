"""Controls: what shows whether a score means what it seems to. In: a task, a simulator, a rollout folder. Out: facts to stand beside the score.

Does the policy read (`instruction_given`)? What did the env seed vary (`moved_by_seed`)? What do others reach on the same
tasks, who don't look, or know everything (`beside`)?
"""

import re
from pathlib import Path
from typing import TypedDict

import numpy as np

from prismatic.episodes.result import Facts, TaskCounts, read_run
from prismatic.errors import ConfigError
from prismatic.filenames import SUMMARY
from prismatic.records import read_record
from prismatic.rollout import Simulator
from prismatic.scene.suites import Benchmark
from prismatic.statistics import wilson_interval

PROTOCOL_SEED = 0  # LIBERO's env seed in every published number
MOVED = 0.5  # mm, below which a thing stands where it stood; turns count by what they move at TURN_RADIUS
TURN_RADIUS = 100.0  # mm from its middle
VERBS = {
    "pick up": "grab",
    "put": "place",
    "place": "set",
    "open": "pull open",
    "close": "shut",
    "turn on": "switch on",
    "turn off": "switch off",
    "push": "move",
    "stack": "pile",
}
FLOORS_AND_CEILINGS = ("zero", "random", "replay", "expert")
SAME_EPISODES = ("task_suite_name", "env_seed", "num_steps_wait", "step_limit")

KNOWN_LATER = ("benchmark_files",)  # facts of a run that those of before did not record: they go on without


class _Counts(TypedDict):
    """What is read of a neighbour's summary.json."""

    per_task: list[TaskCounts]


def instruction_given(benchmark: Benchmark, suite: str, task_id: int, kind: str) -> str:
    """What a policy is given instead of a task's own sentence.

    swap: that of the next task of the suite whose sentence is another. empty: "". paraphrase: LIBERO-PRO's (suite
    `<suite>_lan`), and where it has none, the sentence with other verbs. ConfigError where a suite has one sentence only.
    """
    own = benchmark.instruction(suite, task_id)
    if kind == "empty":
        return ""
    if kind == "swap":
        count = benchmark.num_tasks(suite)
        for step in range(1, count):
            if (other := benchmark.instruction(suite, (task_id + step) % count)) != own:
                return other
        raise ConfigError(f"all tasks of {suite} have one sentence: --instruction swap has no other to give")
    try:
        return benchmark.instruction(f"{suite}_lan", task_id)
    except ConfigError:  # no such suite
        verbs = re.compile(rf"\b({'|'.join(VERBS)})\b", re.IGNORECASE)
        return verbs.sub(lambda found: VERBS[found[0].lower()], own)


def moved_by_seed(sim: Simulator, *, settle: int) -> dict[str, float]:
    """What stands elsewhere after a reset with the simulator's env seed than with the protocol's: name → mm.

    Compared at the first stored state, after settling. Objects are where the stored state puts them, so it is fixtures
    that move, and what fell off them.
    """
    seed, places = sim.env_seed, []
    for sim.env_seed in (PROTOCOL_SEED, seed):
        sim.reset(0, settle=settle)
        places.append(sim.places())
    moved = {name: _distance(place, places[1][name]) for name, place in places[0].items()}
    return {name: round(distance, 1) for name, distance in moved.items() if distance > MOVED}


def _distance(before: np.ndarray, after: np.ndarray) -> float:
    """mm between two places (7,): the larger of how far its middle moved and a point TURN_RADIUS from it turned."""
    turn = 2 * np.arccos(np.clip(abs(before[3:] @ after[3:]), 0, 1))
    return float(max(1000 * np.linalg.norm(before[:3] - after[:3]), TURN_RADIUS * turn))


def beside(folder: Path, identity: Facts, *, task_ids: set[int]) -> Facts:
    """Controls that lie in the neighbouring rollout folders: name → their result on these tasks.

    zero, random, replay and expert count when they played the same suite, env seed and limits; a changed instruction when
    the weights are this run's too. Of several, the one with most episodes.
    """
    found: dict[str, Facts] = {}
    for path in sorted(folder.resolve().parent.glob(f"*/{SUMMARY}")):
        if path.parent.name == folder.resolve().name:
            continue
        try:
            counts, other = read_record(path, _Counts), read_run(path.parent).identity
            name = _control(other, identity)
        except (ConfigError, KeyError):  # someone else's file
            continue
        tasks = [task for task in counts["per_task"] if task["task_id"] in task_ids]
        successes = sum(task["successes"] for task in tasks)
        judged = successes + sum(task["failures"] for task in tasks)
        if name and judged > found.get(name, {"judged": 0})["judged"]:
            found[name] = {
                "successes": successes,
                "judged": judged,
                "tasks": [task["task_id"] for task in tasks],
                "success_rate": successes / judged,
                "interval_95": list(wilson_interval(successes, judged)),
                "folder": path.parent.name,
            }
    return found


def _control(other: Facts, own: Facts) -> str | None:
    """Which control of a run `own` the run `other` is, by their identities."""
    if any(other.get(name) != own.get(name) for name in SAME_EPISODES):
        return None
    if other["policy"] in FLOORS_AND_CEILINGS:
        return other["policy"] if other["policy"] != own["policy"] else None
    reworded = other.get("instruction")
    apart = dict.fromkeys(["instruction", *(name for name in KNOWN_LATER if name not in other or name not in own)])
    return f"instruction {reworded}" if reworded and {**other, **apart} == {**own, **apart} else None
