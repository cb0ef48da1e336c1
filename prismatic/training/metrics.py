"""The numbers of a training step: how far a model's actions are from the recorded ones. In: a forward pass's output and its batch."""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from action_tokenizer import ActionTokenizer
from prismatic.models.vla import IGNORE, VLAOutput
from prismatic.processor import Batch


@dataclass
class Metrics:
    """Of one optimisation step, under the original's names. None: the head has no such number."""

    loss: float
    l1_loss: float  # mean |difference| of the actions, in normalised units; of tokens, of their bins' centres
    action_accuracy: float | None = None  # share of the action tokens that the arg-max of the logits gets right
    curr_action_l1_loss: float | None = None  # of a chunk's first action
    next_actions_l1_loss: float | None = None  # of its other actions
    curr_action_accuracy: float | None = None
    next_actions_accuracy: float | None = None
    grad_norm: float = 0.0  # of all trained parameters together, before clipping

    def is_finite(self) -> bool:
        """Whether the step's gradients may be used."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def row(self) -> dict[str, float]:
        """The numbers that there are, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


class ActionErrors(NamedTuple):
    """How far a model's actions are from the recorded ones: (B, K, D) arrays."""

    distance: np.ndarray  # |difference|, normalised units
    correct: np.ndarray | None  # whether the arg-max is the right token; None for a head without tokens


def action_errors(out: VLAOutput, batch: Batch, tokenizer: ActionTokenizer) -> ActionErrors:
    """Compare what a forward pass with labels gave with the batch's actions (B, K, D)."""
    assert batch.actions is not None
    if out.logits is None:
        assert out.actions is not None
        return ActionErrors((out.actions.detach().float().cpu() - batch.actions.cpu()).abs().numpy(), None)
    counted = batch.labels[:, 1:].cpu()
    counted = counted[counted != IGNORE]
    is_action = counted >= tokenizer.first_id
    shape = batch.actions.shape
    predicted = out.logits.detach().argmax(dim=-1).cpu()[is_action].numpy().reshape(shape)
    true = counted[is_action].numpy().reshape(shape)
    return ActionErrors(np.abs(tokenizer.decode(predicted) - tokenizer.decode(true)), predicted == true)


def measure(loss: float, errors: ActionErrors) -> Metrics:
    """A batch's metrics; those of the first and the other actions where there is a chunk."""
    metrics = Metrics(loss, float(errors.distance.mean()))
    chunked = errors.distance.shape[1] > 1
    if chunked:
        metrics.curr_action_l1_loss = float(errors.distance[:, :1].mean())
        metrics.next_actions_l1_loss = float(errors.distance[:, 1:].mean())
    if errors.correct is not None:
        metrics.action_accuracy = float(errors.correct.mean())
        if chunked:
            metrics.curr_action_accuracy = float(errors.correct[:, :1].mean())
            metrics.next_actions_accuracy = float(errors.correct[:, 1:].mean())
    return metrics


def measured(out: VLAOutput, batch: Batch, *, tokenizer: ActionTokenizer) -> dict[str, float]:
    """The metrics of one micro-batch by name, as step.backward wants them."""
    assert out.loss is not None
    return measure(out.loss.item(), action_errors(out, batch, tokenizer)).row()
