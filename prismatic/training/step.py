"""Pieces of the training loop: one optimisation step's arithmetic, the learning rate, what a stop signal does.

In: a model and batches. Out: gradients and numbers. The order in which they are called is finetune.py's.
"""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from action_tokenizer import ActionTokenizer
from prismatic.errors import Terminated
from prismatic.models.vla import IGNORE
from prismatic.processor import Batch
from prismatic.training.distributed import ALONE, Ranks, gradients_wait


def learning_rate(step: int, *, peak: float, schedule: str, warmup_steps: int, max_steps: int) -> float:
    """Of step 0, 1, …: rises over warmup_steps, then stays at peak ("constant") or falls to zero at max_steps along half a cosine ("cosine")."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(max_steps - warmup_steps, 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


@dataclass
class Metrics:
    """Of one optimisation step, over all of its passes: OpenVLA's training metrics."""

    loss: float = 0.0
    action_accuracy: float = 0.0  # share of the action tokens that the arg-max of the logits gets right
    l1_loss: float = 0.0  # mean |difference| of the decoded bin centres, in normalised units
    grad_norm: float = 0.0  # of all trained parameters together, before clipping

    def is_finite(self) -> bool:
        """Whether the step's gradients may be used."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def action_errors(
    logits: torch.Tensor, labels: torch.Tensor, tokenizer: ActionTokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each action token of a batch: its dimension (0 … 6), whether the arg-max is right, |difference| of the bin centres; all (N,).

    logits (labels that count, rows) as VLA.forward gives them; labels (B, T).
    """
    following, predicted = labels[:, 1:].cpu(), logits.argmax(dim=-1).cpu()
    is_action = following >= tokenizer.first_id
    dimension = (is_action.cumsum(dim=1) - 1)[is_action]
    counted = following[following != IGNORE]
    actions = counted >= tokenizer.first_id
    predicted, true = predicted[actions].numpy(), counted[actions].numpy()
    return dimension.numpy(), predicted == true, np.abs(tokenizer.decode(predicted) - tokenizer.decode(true))


def action_metrics(logits: torch.Tensor, labels: torch.Tensor, tokenizer: ActionTokenizer) -> tuple[float, float]:
    """Accuracy and L1 over the action tokens; arguments as above."""
    _, correct, distance = action_errors(logits, labels, tokenizer)
    return float(correct.mean()), float(distance.mean())


def attention_kernel(device: str, autocast: bool) -> contextlib.AbstractContextManager[Any]:
    """The plain sum of products on a CPU in bfloat16: the fused kernel's gradient takes four times as long there (torch 2.15)."""
    return sdpa_kernel(SDPBackend.MATH) if autocast and device == "cpu" else contextlib.nullcontext()


def one_pass(model: nn.Module, batch: Batch, *, passes: int, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and logits of a batch on the model's device; a step's share of the gradients (one of `passes`) is added to what is there."""
    device = batch.input_ids.device.type
    # the kernel is chosen for the backward pass too, which computes blocks again where activations are recomputed
    with attention_kernel(device, autocast):
        # no cache: it would hold a copy of every trained weight until the end of the pass, recomputing or not
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
            out = model(batch.input_ids, batch.attention_mask, batch.pixel_values, batch.labels)
        (out.loss / passes).backward()
    return out.loss.detach(), out.logits.detach()


def backward(
    model: nn.Module,
    passes: Sequence[Batch],
    tokenizer: ActionTokenizer,
    *,
    autocast: bool,
    ranks: Ranks = ALONE,
) -> Metrics:
    """Gradients of the mean loss of several passes (gradient accumulation) of all ranks, added to what is there; returns the mean metrics.

    model: a VLA, or what Ranks.parallel made of it.
    Every sample has as many labels as any other, so a mean of means is the mean.
    """
    total = Metrics()
    device = next(model.parameters()).device
    for number, batch in enumerate(passes, start=1):
        with gradients_wait(model, number < len(passes)):
            loss, logits = one_pass(model, batch.to(device), passes=len(passes), autocast=autocast)
        accuracy, l1 = action_metrics(logits, batch.labels, tokenizer)
        total.loss += loss.item() / len(passes)
        total.action_accuracy += accuracy / len(passes)
        total.l1_loss += l1 / len(passes)
    return Metrics(*ranks.mean(dataclasses.astuple(total)))


def clip_gradients(parameters: Iterable[torch.Tensor], max_norm: float) -> float:
    """Scale gradients down to max_norm if their norm is above it (0: never); returns the norm that they had."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


class StopSignal:
    """Ctrl-C and SIGTERM end the run after the present step, so that it can save; a second one ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self.received = number
        print("\nstopping after this step and saving (once more: stop at once)", flush=True)

    def agreed(self, ranks: Ranks) -> int | None:
        """The signal that any rank has received by now, the same answer on all."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if ranks.mean([self.received == number])[0]:
                return number
        return None
