"""What drafting saves where it is used: in episodes of the simulator, where one frame resembles the last.

Every frame is decoded plainly and with the last answer as its draft, and both must say the same; a row a task.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from prismatic import simulator
from prismatic.checkpoint import load_policy
from prismatic.policy import Policy


class Both:
    """A policy that decodes each frame with and without drafting, and counts."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.num_images = policy, policy.num_images
        self.seconds: Counter[bool] = Counter()
        self.different = 0
        self.episode = (0, 0)  # task and trial

    def __call__(self, frame: np.ndarray, instruction: str, wrist: np.ndarray | None = None) -> np.ndarray:
        wrists = None if wrist is None else [wrist]
        answers = {}
        for drafting in (False, True):
            self.policy.drafting = drafting
            before = self.policy.counts.copy()
            start = time.perf_counter()
            answers[drafting] = self.policy.action_ids([frame], [instruction], wrists, episodes=[self.episode])
            self.seconds[drafting] += time.perf_counter() - start
            if not drafting:
                self.policy.counts = before
        self.different += int((answers[True] != answers[False]).sum())
        return self.policy.processor.actions(answers[False])[0].astype(np.float32)


def run(checkpoint: str, *, suite: str, task_ids: Sequence[int], num_trials: int, quality: str) -> list[dict[str, Any]]:
    """Rows: actions, confirmed words of the seven, passes an action, rows redone for doubt, words that differ (must be 0), ms of both ways."""
    policy = load_policy(checkpoint)
    cameras = ("agentview", "robot0_eye_in_hand")[: policy.num_images]
    rows = []
    for task_id in task_ids:
        sim = simulator.Simulator(suite, task_id, cameras=cameras, env_seed=0, quality=quality)
        both, successes = Both(policy), 0
        policy.counts.clear()
        for trial in range(num_trials):
            both.episode = (task_id, trial)
            episode = simulator.rollout(sim, both, init_state=trial, max_steps=simulator.step_limit(suite))
            if episode.error:
                raise RuntimeError(f"task {task_id}, state {trial}: {episode.error}")
            successes += episode.success
        sim.close()
        counts = policy.counts
        rows.append(
            {
                "task": task_id,
                "episodes": num_trials,
                "successes": successes,
                "actions": counts["actions"],
                "confirmed words": round(counts["confirmed"] / counts["actions"], 2),
                "passes": round(counts["passes"] / counts["actions"], 2),
                "doubtful": counts["doubtful"],
                "different words": both.different,
                "plain ms": round(1e3 * both.seconds[False] / counts["actions"], 1),
                "drafted ms": round(1e3 * both.seconds[True] / counts["actions"], 1),
            }
        )
    return rows
