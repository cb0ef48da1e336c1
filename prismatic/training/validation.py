"""How well a model in training does on episodes that it never learns from. In: model, mixture, processor. Out: fields named val_….

The frames are always the same ones, evenly spaced over the held-out episodes, and look as they would when acting: no augmentation, the centre
cropped. Surprising: no random number is drawn, so that a run with validation learns the same as one without.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from prismatic.data.examples import example
from prismatic.data.frames import Mixture
from prismatic.models.vla import VLA
from prismatic.processor import Processor
from prismatic.training.distributed import SINGLE_PROCESS, Ranks
from prismatic.training.metrics import ActionErrors, action_errors

FRAMES = 256  # at most, of all data sets together: 1,792 action tokens, an accuracy to about ±1 %
BEST_BY = "val_l1_loss"  # the lower the better: unlike accuracy it tells a near miss from a far one


class Validation:
    """`validation(vla, …)` → the fields. With several ranks, each computes its share and all get the whole.

    every: steps between validations, 0 for none; last: the run's last step, after which there is one too.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Processor,
        *,
        batch_size: int,
        every: int = 1,
        last: int = 1,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        self.mixture, self.processor, self.batch_size, self.ranks = mixture, processor, batch_size, ranks
        self.every, self.last = every, last
        self.frames = mixture.held_out(FRAMES)
        self.shape = (mixture.num_actions_chunk, mixture.action_dim)  # K, D
        if every and not self.frames:
            print("notice: no episode is held out, so nothing is validated: --val_share 0.2 holds out a fifth")

    def due(self, done: int) -> bool:
        """Whether to validate after `done` steps; never without held-out frames."""
        return bool(self.frames) and self.every > 0 and (done % self.every == 0 or done == self.last)

    def __call__(self, vla: VLA, *, autocast: bool, stopped: Callable[[], bool]) -> dict[str, Any]:
        """val_loss, val_l1_loss (normalised units) and val_action_accuracy (of tokens), the last two also per dimension, and of a chunk's
        first and other actions; {} if `stopped` says so. Where there are several ranks, all of them have to call it, and `stopped` has to
        answer the same on each.
        """
        vla.eval()
        sums = self._sums(vla, autocast=autocast, stopped=stopped)
        vla.train()
        if sums is None:
            return {}
        samples, loss, *sums = (self.ranks.size * np.array(self.ranks.mean(sums.tolist()))).tolist()
        distance, correct = np.reshape(sums, (2, *self.shape)) / samples
        errors = ActionErrors(distance, None if self.processor.config.action_head == "l1" else correct)
        fields: dict[str, Any] = {"val_loss": loss / samples, "val_frames": round(samples)}
        fields |= {f"val_{name}": value for name, value in errors.numbers().items()}
        for name, values in (("l1_loss", errors.distance), ("action_accuracy", errors.correct)):
            if values is not None:
                fields[f"val_{name}_per_dimension"] = values.mean(axis=0).tolist()
        return fields

    @torch.no_grad()
    def _sums(self, vla: VLA, *, autocast: bool, stopped: Callable[[], bool]) -> np.ndarray | None:
        """(2 + 2·K·D,), of this rank: number of samples and sum of their losses; summed distances, then right tokens, of each action number."""
        device = next(vla.parameters()).device
        samples, loss, distance, correct = 0, 0.0, np.zeros(self.shape), np.zeros(self.shape)
        for number in range(math.ceil(len(self.frames) / (self.batch_size * self.ranks.size))):
            if stopped():
                return None
            start = (number * self.ranks.size + self.ranks.rank) * self.batch_size
            share = self.frames[start : start + self.batch_size]
            # a rank without a share goes along all the same: where weights are sharded, a forward pass needs every rank
            steps = [self.mixture.step(*place) for place in share or self.frames[:1]]
            batch = self.processor.collate([example(step, self.processor, as_acting=True) for step in steps]).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
                out = vla(**vars(batch))
            if share and out.loss is not None:
                errors = action_errors(out, batch, self.processor.action_tokenizer)
                samples, loss = samples + len(share), loss + len(share) * out.loss.item()
                distance += errors.distance.sum(0)
                correct += 0 if errors.correct is None else errors.correct.sum(0)
        return np.concatenate([[samples, loss], distance.ravel(), correct.ravel()])
