"""One optimisation step: the gradients of its micro-batches, its numbers, its learning rate.

In: a model and batches. Out: gradients, added to what is there, and Metrics. finetune.py says in which order.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from action_tokenizer import ActionTokenizer
from prismatic.models.vla import IGNORE, VLAOutput
from prismatic.processor import Batch

DECAY = 0.1  # what a learning rate is multiplied by at its decay step, as in OpenVLA-OFT


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: str,
    max_steps: int,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
    decay_step: int = 0,
) -> float:
    """Of step 0, 1, …: rises over warmup_steps from warmup_start · peak, then stays at peak ("constant") or falls to zero at max_steps along
    half a cosine ("cosine"). From decay_step on (0: never) it is a tenth of that: warm-up and decay act together.
    """
    rate = peak * (DECAY if decay_step and step >= decay_step else 1)
    if step < warmup_steps:
        return rate * (step + 1) / warmup_steps * (1 - warmup_start) + rate * warmup_start
    if schedule == "constant":
        return rate
    done = (step - warmup_steps) / max(max_steps - warmup_steps, 1)
    return rate * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


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


def inputs_of(batch: Batch) -> dict[str, torch.Tensor | None]:
    """What VLA.forward takes of a batch, by name."""
    return vars(batch)


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


def attention_kernel(device: str, autocast: bool) -> AbstractContextManager[Any]:
    """The plain sum of products on a CPU in bfloat16: the fused kernel's gradient takes four times as long there (torch 2.15)."""
    return sdpa_kernel(SDPBackend.MATH) if autocast and device == "cpu" else contextlib.nullcontext()


def backward(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    tokenizer: ActionTokenizer,
    *,
    autocast: bool,
    no_sync: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    mean: Callable[[Sequence[float]], Sequence[float]] = tuple,
) -> Metrics:
    """Add the gradients of the mean loss of the micro-batches (gradient accumulation) to what is there; returns the mean metrics.

    model: a VLA, or DDP's wrapper of one. Of several processes: `no_sync` keeps them from exchanging gradients before the last micro-batch,
    `mean` is over them. Every sample has as many labels as any other, so a mean of means is the mean.
    """
    share, rows = 1 / len(micro_batches), []
    device = next(model.parameters()).device
    for number, batch in enumerate(micro_batches, start=1):
        batch = batch.to(device)
        # the kernel is chosen for the backward pass too, which computes blocks again where activations are recomputed
        with (
            contextlib.nullcontext() if number == len(micro_batches) else no_sync(),
            attention_kernel(device.type, autocast),
        ):
            # no cache: it would hold a copy of every trained weight until the end, recomputing or not
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
                out = model(**inputs_of(batch))
            (out.loss / len(micro_batches)).backward()
        rows.append(measure(out.loss.item(), action_errors(out, batch, tokenizer)).row())
    values = mean([sum(row[name] * share for row in rows) for name in rows[0]])
    return Metrics(**dict(zip(rows[0], values, strict=True)))


def clip_gradients(parameters: Iterable[torch.Tensor], max_norm: float) -> float:
    """Scale gradients down to max_norm if their norm is above it (0: never); returns the norm that they had."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
