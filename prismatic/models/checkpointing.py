"""Two passes over a built VLA that change neither names nor results: forget a block's activations and compute them again in the backward pass,
and compile each block. In: a VLA, with its adapters if it gets any. Out: the same object.

A block is a decoder layer, or a block of an image tower that is run (the last of each never is).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from prismatic.models.vla import VLA


def checkpoint_activations(vla: VLA) -> VLA:
    """Keep only each block's input until the backward pass, which runs the block again: memory for a third of the time.

    The non-reentrant form, so that gradients are bit-equal to those without it (dropout included: it draws the same again). Without
    gradients (validation, acting) nothing changes.
    """
    for block in vla.blocks():
        draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())
        block.forward = _recomputing(block.forward, preserve_rng_state=draws)  # not a wrapper: names must stay
    return vla


def _recomputing(forward: Callable[..., Any], *, preserve_rng_state: bool) -> Callable[..., Any]:
    def recomputed(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    return recomputed


def compile_blocks(vla: VLA, *, backend: str = "inductor") -> VLA:
    """torch.compile of each block by itself: blocks of one kind share the code, so it takes one layer's compile time, not 32 layers'.

    After checkpoint_activations, if both are wanted.
    """
    for block in vla.blocks():
        block.compile(backend=backend, dynamic=True)  # rows of a batch differ in length from step to step
    return vla
