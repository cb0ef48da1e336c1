"""How well a model in training does on episodes that it never learns from. In: model, mixture, processor. Out: fields named val_….

The frames are always the same ones, evenly spaced over the held-out episodes, and look as they would when acting: no augmentation, the centre
cropped. Surprising: no random number is drawn, so that a run with validation learns the same as one without.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from prismatic.data.examples import example
from prismatic.data.frames import Mixture
from prismatic.models.vla import VLA
from prismatic.normalize import ACTION_DIMENSIONS
from prismatic.processor import Processor
from prismatic.training.distributed import ALONE, Ranks
from prismatic.training.run_folder import RunFolder
from prismatic.training.step import action_errors

FRAMES = 256  # at most, of all data sets together: 1,792 action tokens, an accuracy to about ±1 %
BEST_BY = "val_l1_loss"  # the lower the better: unlike accuracy it tells a near miss from a far one


def is_best(run: RunFolder, validated: Mapping[str, Any], ranks: Ranks = ALONE) -> bool:
    """Whether these fields, if there are any, are better than those of the run's best checkpoint. The same answer on all ranks."""
    if not validated:
        return False
    best = ranks.on_first(run.best)
    return best is None or validated[BEST_BY] < best.value


class Validation:
    """`validation(vla, …)` → the fields. With several ranks, each computes its share and all get the whole."""

    def __init__(self, mixture: Mixture, processor: Processor, *, batch_size: int, ranks: Ranks = ALONE) -> None:
        self.mixture, self.processor, self.batch_size = mixture, processor, batch_size
        self.ranks = ranks
        self.frames = mixture.held_out(FRAMES)

    def due(self, done: int, *, every: int, last: int) -> bool:
        """Whether to validate after `done` steps: every so many (0: never), and after the last; False without held-out frames."""
        return bool(self.frames) and every > 0 and (done % every == 0 or done == last)

    def __call__(self, vla: VLA, *, autocast: bool, stopped: Callable[[], bool]) -> dict[str, Any]:
        """val_loss, val_action_accuracy, val_l1_loss (normalised units) and the last two per dimension; {} if `stopped` says so.

        Where there are several ranks, all of them have to call it, and `stopped` has to answer the same on each.
        """
        training = vla.training
        vla.eval()
        try:
            sums = self._sums(vla, autocast=autocast, stopped=stopped)
        finally:
            vla.train(training)
        if sums is None:
            return {}
        whole = self.ranks.size * np.reshape(self.ranks.mean(sums.ravel().tolist()), sums.shape)
        (samples, loss, *_), tokens, correct, distance = whole
        return {
            "val_loss": float(loss / samples),
            "val_action_accuracy": float(correct.sum() / tokens.sum()),
            "val_l1_loss": float(distance.sum() / tokens.sum()),
            "val_action_accuracy_per_dimension": (correct / tokens).tolist(),
            "val_l1_loss_per_dimension": (distance / tokens).tolist(),
            "val_frames": round(samples),
        }

    @torch.no_grad()
    def _sums(self, vla: VLA, *, autocast: bool, stopped: Callable[[], bool]) -> np.ndarray | None:
        """(4, 7), of this rank: samples and loss; action tokens per dimension; right ones; distances."""
        device = next(vla.parameters()).device
        sums = np.zeros((4, len(ACTION_DIMENSIONS)))
        for number in range(math.ceil(len(self.frames) / (self.batch_size * self.ranks.size))):
            if stopped():
                return None
            start = (number * self.ranks.size + self.ranks.rank) * self.batch_size
            share = self.frames[start : start + self.batch_size]
            # a rank without a share goes along all the same: where weights are sharded, a pass needs every rank
            steps = [self.mixture.caches[dataset][frame] for dataset, frame in share or self.frames[:1]]
            batch = self.processor.collate([example(step, self.processor, as_acting=True) for step in steps]).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                out = vla(batch.input_ids, batch.attention_mask, batch.pixel_values, batch.labels)
            if share and out.loss is not None:
                dimension, correct, distance = action_errors(out.logits, batch.labels, self.processor.action_tokenizer)
                sums[0, :2] += len(share), len(share) * out.loss.item()
                for row, weight in zip(sums[1:], (None, correct, distance), strict=True):
                    row += np.bincount(dimension, weight, minlength=len(row))
        return sums
