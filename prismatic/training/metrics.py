"""How far a model's actions are from the recorded ones, when it trains and when it is validated. In: a forward pass's output and its batch."""

from typing import NamedTuple

import numpy as np

from action_tokenizer import ActionTokenizer
from prismatic.models.vla import IGNORE, VLAOutput
from prismatic.processor import Batch


class ActionErrors(NamedTuple):
    """(B, K, D) of samples, or (K, D) of their means."""

    distance: np.ndarray  # |difference|, normalised units; of tokens, of their bins' centres
    correct: np.ndarray | None  # whether the arg-max is the right token; None for a head without tokens

    def numbers(self) -> dict[str, float]:
        """Means under the original's names; those of the first and of the other actions too where there is a chunk."""
        named: dict[str, float] = {}
        for name, values in (("l1_loss", self.distance), ("action_accuracy", self.correct)):
            if values is None:
                continue
            named[name] = float(values.mean())
            if values.shape[-2] > 1:
                what = name.removeprefix("action_")
                named[f"curr_action_{what}"] = float(values[..., 0, :].mean())
                named[f"next_actions_{what}"] = float(values[..., 1:, :].mean())
        return named


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


def measured(out: VLAOutput, batch: Batch, *, tokenizer: ActionTokenizer) -> dict[str, float]:
    """The numbers of one micro-batch by name, as step.backward wants them."""
    assert out.loss is not None
    return {"loss": out.loss.item(), **action_errors(out, batch, tokenizer).numbers()}
