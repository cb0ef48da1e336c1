"""What drafting saves where it is used: in episodes of the simulator, where one frame resembles the last.

Every frame is decoded plainly and with the last answer as its draft, and both must say the same.
"""

import time
from typing import Any

import numpy as np
import torch

from prismatic import simulator
from prismatic.checkpoint import load_policy
from prismatic.policy import Policy


class Both:
    """A policy that decodes each frame with and without drafting, and counts."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.num_images = policy, policy.num_images
        self.seconds = {False: 0.0, True: 0.0}
        self.different = 0
        self.episode = 0

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


def run(checkpoint: str, *, suite: str, task_id: int, episodes: int, steps: int, quality: str) -> list[dict[str, Any]]:
    """One row: actions, confirmed words of the seven, passes an action, rows redone for doubt, words that differ (must be 0), ms of both ways."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    policy = load_policy(checkpoint)
    cameras = ("agentview", "robot0_eye_in_hand")[: policy.num_images]
    sim = simulator.Simulator(suite, task_id, cameras=cameras, env_seed=0, quality=quality)
    both, successes = Both(policy), 0
    for trial in range(episodes):
        both.episode = trial
        played = simulator.rollout(sim, both, init_state=trial, max_steps=steps)
        if played.error:
            raise RuntimeError(f"task {task_id}, state {trial}: {played.error}")
        successes += played.success
    sim.close()
    counts = policy.counts
    return [
        {
            "task": task_id,
            "episodes": episodes,
            "successes": successes,
            "actions": counts["actions"],
            "confirmed words": round(counts["confirmed"] / counts["actions"], 2),
            "passes": round(counts["passes"] / counts["actions"], 2),
            "doubtful": counts["doubtful"],
            "different words": both.different,
            "plain ms": round(1e3 * both.seconds[False] / counts["actions"], 1),
            "drafted ms": round(1e3 * both.seconds[True] / counts["actions"], 1),
        }
    ]
