"""Pieces of the training loop: one optimisation step's arithmetic, the learning rate, what a stop signal does.

In: a model and batches. Out: gradients and numbers. The order in which they are called is finetune.py's.
"""

import contextlib
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from action_tokenizer import ActionTokenizer
from prismatic.errors import Terminated
from prismatic.models.vla import IGNORE, VLA
from prismatic.processor import Batch


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


def action_metrics(logits: torch.Tensor, labels: torch.Tensor, tokenizer: ActionTokenizer) -> tuple[float, float]:
    """Accuracy and L1 over the action tokens. logits (labels that count, rows) as VLA.forward gives them; labels (B, T)."""
    targets = labels[:, 1:][labels[:, 1:] != IGNORE]
    actions = targets >= tokenizer.first_id
    predicted, true = logits.argmax(dim=-1)[actions], targets[actions]
    difference = tokenizer.decode(predicted.cpu().numpy()) - tokenizer.decode(true.cpu().numpy())
    return (predicted == true).float().mean().item(), float(np.abs(difference).mean())


def attention_kernel(device: str, autocast: bool) -> contextlib.AbstractContextManager[None]:
    """The plain sum of products on a CPU in bfloat16: the fused kernel's gradient takes four times as long there (torch 2.15)."""
    return sdpa_kernel(SDPBackend.MATH) if autocast and device == "cpu" else contextlib.nullcontext()


def backward(vla: VLA, passes: Sequence[Batch], tokenizer: ActionTokenizer, *, autocast: bool) -> Metrics:
    """Gradients of the mean loss of several passes (gradient accumulation), added to what is there; returns the mean metrics."""
    total = Metrics()
    for batch in passes:
        device = next(vla.parameters()).device
        batch = batch.to(device)
        with (
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast),
            attention_kernel(device.type, autocast),
        ):
            out = vla(batch.input_ids, batch.attention_mask, batch.pixel_values, batch.labels)
        assert out.loss is not None
        (out.loss / len(passes)).backward()
        accuracy, l1 = action_metrics(out.logits.detach(), batch.labels, tokenizer)
        total.loss += out.loss.item() / len(passes)
        total.action_accuracy += accuracy / len(passes)
        total.l1_loss += l1 / len(passes)
    return total


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
