"""Controls in a simulator process: does the policy read (`instruction_given`), and what did the env seed vary (`moved_by_seed`)?"""

import numpy as np

from prismatic.errors import ConfigError
from prismatic.rollout import Simulator
from prismatic.scene.suites import Benchmark

PROTOCOL_SEED = 0  # LIBERO's env seed in every published number
MOVED = 0.5  # mm, below which a thing stands where it stood; turns count by what they move at TURN_RADIUS
TURN_RADIUS = 100.0  # mm from its middle


def instruction_given(benchmark: Benchmark, suite: str, task_id: int, kind: str) -> str:
    """What a policy is given instead of a task's own sentence.

    swap: that of the next task of the suite whose sentence is another. empty: "". paraphrase: LIBERO-PRO's (suite `<suite>_lan`).
    ConfigError where there is none.
    """
    if kind == "empty":
        return ""
    if kind == "paraphrase":
        try:
            return benchmark.instruction(f"{suite}_lan", task_id)
        except ConfigError:
            raise ConfigError(f"nobody has paraphrased {suite}: give --instruction swap or empty") from None
    own, count = benchmark.instruction(suite, task_id), benchmark.num_tasks(suite)
    for step in range(1, count):
        if (other := benchmark.instruction(suite, (task_id + step) % count)) != own:
            return other
    raise ConfigError(f"all tasks of {suite} have one sentence: --instruction swap has no other to give")


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
