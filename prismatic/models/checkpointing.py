"""Passes over a built VLA for training that change neither names nor results: keep less until the backward pass, compile each block.

In: a VLA, with its adapters if it gets any. Out: the same object. A block is a decoder layer, or a block of an image tower that is run.

    lean_activations         norms and SwiGLU keep their inputs only, no float32 copies; free
    checkpoint_activations   each block keeps its input and runs again in the backward pass (a third more work), or, selective, it also keeps
                             the results of its large matrix products and attention, and redoes only norms, SiLU, rotary and adapters
    compile_blocks           torch.compile of each block by itself
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from prismatic.models.compiled import variants
from prismatic.models.llama import MLP, RMSNorm
from prismatic.models.vla import VLA

PLAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # of checkpoint, where nothing is drawn
LARGE = 256  # inner size from which a matrix product costs more than what its result takes: an adapter's second one (its rank) is redone
NF4_PRODUCT = "bitsandbytes.gemm_4bit"  # by its name: that library may be missing
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm}
ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
    for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
}


def _recomputing(forward: Callable[..., Any], options: dict[str, Any] = PLAIN) -> Callable[..., Any]:
    """The same function, whose inner results are computed again in the backward pass. Without gradients nothing changes."""

    def recomputed(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, **options)

    return recomputed


class LeanMLP(MLP):
    """MLP that does not keep silu(gate)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = _recomputing(lambda gate, up: F.silu(gate) * up)
        return self.down_proj(product(self.gate_proj(x), self.up_proj(x)))


def lean_activations(vla: VLA) -> VLA:
    """Let the decoder's norms and SwiGLU keep their inputs only; not a bit changes."""
    for module in vla.language_model.modules():
        if isinstance(module, RMSNorm):
            module.forward = _recomputing(module.forward)
        elif isinstance(module, MLP):
            module.__class__ = LeanMLP
    return vla


def checkpoint_activations(vla: VLA, *, selective: bool = False) -> VLA:
    """Compute each block's activations again in the backward pass: all of them, or (selective) the cheap ones.

    The non-reentrant form, so that gradients are bit-equal to those without it (dropout included: it draws the same again).
    """
    for block in vla.blocks():
        draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())
        options = PLAIN | {"preserve_rng_state": draws}
        if selective:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
        block.forward = _recomputing(block.forward, options)  # not a wrapper: names must stay
    return vla


def keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """torch's selective policy: results of attention and of large matrix products are kept, everything else is redone."""
    packet = getattr(operator, "overloadpacket", None)
    large = packet in PRODUCTS and args[-1].shape[0] >= LARGE  # the inner size is the right factor's first
    kept = large or packet in ATTENTION or str(packet) == NF4_PRODUCT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(vla: VLA, *, backend: str = "inductor") -> VLA:
    """torch.compile of each block by itself: blocks of one kind share the code, so it takes one layer's compile time, not 32 layers'.

    After checkpoint_activations, if both are wanted.
    """
    limit = variants()
    for block in vla.blocks():
        block.compile(backend=backend, dynamic=True, **limit)  # rows of a batch differ in length from step to step
    return vla
