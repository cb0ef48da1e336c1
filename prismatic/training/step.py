"""One optimisation step: the gradients of its micro-batches, its numbers, its learning rate.

In: a model and batches. Out: gradients, added to what is there, and numbers. finetune.py says in which order.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from prismatic.models.vla import VLAOutput
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


def attention_kernel(device: str, autocast: bool) -> AbstractContextManager[Any]:
    """The plain sum of products on a CPU in bfloat16: the fused kernel's gradient takes four times as long there (torch 2.15)."""
    return sdpa_kernel(SDPBackend.MATH) if autocast and device == "cpu" else contextlib.nullcontext()


def backward(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    *,
    measure: Callable[[VLAOutput, Batch], dict[str, float]],
    autocast: bool,
    no_sync: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    mean: Callable[[Sequence[float]], Sequence[float]] = tuple,
) -> dict[str, float]:
    """Add the gradients of the mean loss of the micro-batches (gradient accumulation) to what is there; returns the mean of what `measure` says.

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
                out = model(**vars(batch))
            (out.loss / len(micro_batches)).backward()
        rows.append(measure(out, batch))
    values = mean([sum(row[name] * share for row in rows) for name in rows[0]])
    return dict(zip(rows[0], values, strict=True))


def clip_gradients(parameters: Iterable[torch.Tensor], max_norm: float) -> float:
    """Scale gradients down to max_norm if their norm is above it (0: never); returns the norm that they had."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
