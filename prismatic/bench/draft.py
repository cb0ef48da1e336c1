"""What drafting saves where it is used: in episodes of the simulator, where one frame resembles the last.

Every frame is decoded three ways, by transformers' generate, by ours, and by ours with the last answer as the draft, and all must say the same.
"""

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prismatic import simulator
from prismatic.bench.plain import PlainDecoder
from prismatic.checkpoint import load_policy
from prismatic.models.decode import Answer, Decoder, with_empty_token
from prismatic.policy import VLAPolicy

WARM_UP = 5  # first frames, which are not timed


class Ways(Decoder):
    """Decodes one row at a time in all three ways, times them and counts the words that differ; its answer is the drafted one."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.vla)
        self.decoder, self.plain = decoder, PlainDecoder(decoder.vla, best=False)
        self.seconds = {"plain": 0.0, "ours": 0.0, "drafted": 0.0}
        self.frames = self.different = 0

    def __call__(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        action_dim: int,
        attention_mask: torch.Tensor | None = None,
        draft: torch.Tensor | None = None,
    ) -> Answer:
        """As Decoder's, of a row without padding."""
        config = self.vla.config
        length = torch.tensor([input_ids.shape[1]], device=input_ids.device)
        words, length = with_empty_token(input_ids, length, empty=config.empty_token_id, pad=config.pad_token_id)
        words = words[:, : int(length)]
        ours = functools.partial(self.decoder, input_ids, pixel_values, action_dim, attention_mask)
        ways = {
            "plain": lambda: self.plain(words, pixel_values, action_dim),
            "ours": ours,
            "drafted": lambda: ours(draft),
        }
        answers: dict[str, Any] = {}
        for number in range(len(ways)):
            # each begins a third of the frames: whoever comes after the simulator finds nothing in the processor's caches
            name = list(ways)[(self.frames + number) % len(ways)]
            start = time.perf_counter()
            answers[name] = ways[name]()
            ids = answers[name] if name == "plain" else answers[name].ids
            ids.cpu()  # waits for a GPU
            if self.frames >= WARM_UP:
                self.seconds[name] += time.perf_counter() - start
        drafted = answers["drafted"]
        self.different += sum(int((drafted.ids != other).sum()) for other in (answers["plain"], answers["ours"].ids))
        self.frames += 1
        return drafted


@dataclass(frozen=True)
class InEpisode:
    """The policy, told in which episode it acts."""

    policy: VLAPolicy
    episode: int

    @property
    def num_images(self) -> int:
        return self.policy.num_images

    def __call__(self, frame: np.ndarray, instruction: str, wrist: np.ndarray | None = None) -> np.ndarray:
        return self.policy(frame, instruction, wrist, episode=self.episode)


def run(checkpoint: str, *, suite: str, task_id: int, episodes: int, steps: int, quality: str) -> list[dict[str, Any]]:
    """One row: words confirmed of the seven, passes an action, rows redone for doubt, ms an action each way.

    RuntimeError where words differ in float32.
    """
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    policy = load_policy(checkpoint, drafting=True)
    policy.decoder = ways = Ways(policy.decoder)
    cameras = ("agentview", "robot0_eye_in_hand")[: policy.num_images]
    sim = simulator.Simulator(suite, task_id, cameras=cameras, env_seed=0, quality=quality)
    successes = 0
    for trial in range(episodes):
        played = simulator.rollout(sim, InEpisode(policy, trial), init_state=trial, max_steps=steps)
        if played.error:
            raise RuntimeError(f"task {task_id}, state {trial}: {played.error}")
        successes += played.success
    sim.close()
    if ways.different and policy.dtype == torch.float32:  # in fewer digits two logits are often equal
        raise RuntimeError(f"{ways.different} words of {ways.frames} actions are not the same in all three ways")
    counts, timed = policy.counts, max(1, ways.frames - WARM_UP)
    milliseconds = {name: round(1e3 * seconds / timed, 1) for name, seconds in ways.seconds.items()}
    return [
        {
            "task": task_id,
            "episodes": episodes,
            "successes": successes,
            "actions": counts["actions"],
            "confirmed words": round(counts["confirmed"] / counts["actions"], 2),
            "passes": round(counts["passes"] / counts["actions"], 2),
            "doubtful": counts["doubtful"],
            "different words": ways.different,
            "plain ms": milliseconds["plain"],
            "ours ms": milliseconds["ours"],
            "drafted ms": milliseconds["drafted"],
            "× plain": round(ways.seconds["plain"] / max(ways.seconds["drafted"], 1e-9), 2),
        }
    ]
