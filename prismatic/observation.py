"""What a policy is asked, by a simulator's process or a client: frames, a sentence, the robot's state; and its answers to a batch of such."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # it needs torch, which a simulator's process does not
    from prismatic.policy import Policy


@dataclass(frozen=True)
class Observation:
    """frame, wrist: (H, W, 3) uint8, upright, or what ImagePath made of them.

    state: (S,) float32. unnorm_key: the statistics that the client believes in, None: any. stream: the same while one robot goes on, so
    that its last answer drafts the next; None: unknown.
    """

    frame: Any
    instruction: str
    wrist: Any = None
    state: np.ndarray | None = None
    unnorm_key: str | None = None
    stream: Hashable = None


def answered(policy: "Policy", asked: Sequence[Observation]) -> np.ndarray:
    """(B, K, D) float32: the policy's chunk for each."""
    wrists = [one.wrist for one in asked] if policy.num_images > 1 else None
    states = [np.asarray(one.state) for one in asked] if policy.uses_state else None
    frames, texts, names = zip(*((one.frame, one.instruction, one.stream) for one in asked), strict=True)
    return policy.batch_chunks(frames, texts, wrists, states, episodes=names)
