"""Decoding through torch.compile, for a model that acts on a GPU (after adapters are merged and weights quantised).

A forward pass is a thousand small kernels, which a GPU runs faster than Python can name them. torch.compile fuses them and records the rest as a
CUDA graph (mode "reduce-overhead"), once for each shape: prompts are padded to a multiple of 64 tokens and batches to one of BATCH_SIZES.
Padding changes no answer: nothing reads a padded token, and padded rows are dropped. All shapes share one key-value cache.

Surprising: a shape's first use takes minutes (torch keeps what it compiled in its own cache, so the next run is faster) and says so. What
can't be compiled runs eagerly, which is said once and stands in `description`. Compiled passes have never run on a GPU.
"""

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from prismatic.models.decode import ActionDecoder, DecodedActions, Layers, Tensors, TokenModel

PROMPT_WIDTH = 64  # tokens: holds every instruction of LIBERO with the prompt around it
BATCH_SIZES = (1, 4, 16, 32, 64)  # rows; larger batches are decoded eagerly
SHAPES = 64  # variants that torch may compile of one function
write_line = partial(tqdm.write, file=sys.stderr)
compile_step = partial(torch.compile, mode="reduce-overhead", fullgraph=True, dynamic=False)


def padded_shape(rows: int, tokens: int) -> tuple[int, int]:
    """The shape that a batch of prompts is padded to; rows beyond the largest stay as they are."""
    return next((size for size in BATCH_SIZES if size >= rows), rows), tokens + -tokens % PROMPT_WIDTH


class CompiledActionDecoder(ActionDecoder):
    """An ActionDecoder of compiled forward passes.

    compiler: turns a function into a compiled one, when it is first called. say: is given one line when something is compiled, or can't be.
    """

    def __init__(
        self,
        vla: TokenModel,
        *,
        compiler: Callable[[Callable[..., Tensors]], Callable[..., Tensors]] = compile_step,
        say: Callable[[str], object] = write_line,
    ) -> None:
        super().__init__(vla)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
        self._say, self._compiled = say, functools.cache(compiler)
        self._views: dict[tuple[int, int], Layers] = {}  # of the cache, by (batch, length)
        self._ready: set[Any] = set()  # (step, batch, length) that were compiled
        self._eager: dict[int, str] = {}  # batch size that can't be compiled → why

    @property
    def description(self) -> str:
        """How forward passes are run, and what is not compiled for which reason."""
        compiled = ["compiled"] * (bool(self._ready) or not self._eager)
        return "; ".join(compiled + [f"eager for a batch of {batch}: {why}" for batch, why in self._eager.items()])

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        action_dim: int,
        attention_mask: torch.Tensor | None = None,
        draft: torch.Tensor | None = None,
    ) -> DecodedActions:
        """As ActionDecoder's."""
        rows, tokens = input_ids.shape
        batch, width = padded_shape(rows, tokens)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)

        def padded(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor[:1].expand(batch - rows, *tensor.shape[1:])])

        answer = super().__call__(
            padded(F.pad(input_ids, (0, width - tokens), value=self.vla.config.pad_token_id)),
            padded(pixel_values),
            action_dim,
            padded(F.pad(attention_mask, (0, width - tokens))),
            None if draft is None else padded(draft),
        )
        return replace(answer, ids=answer.ids[:rows], margins=answer.margins[:rows])

    def _layers(self, batch: int, length: int) -> Layers:
        """The same views each time: a CUDA graph remembers addresses."""
        before = self._cache
        layers = super()._layers(batch, length)
        if self._cache is not before:
            self._views.clear()
        if (batch, length) not in self._views:
            for tensor in (part for layer in layers for part in layer):
                torch._dynamo.mark_static_address(tensor)  # else each pass would copy the cache
            self._views[batch, length] = layers
        return self._views[batch, length]

    def _run(self, step: Any, layers: Layers, *inputs: torch.Tensor) -> Tensors:
        batch, _, length, _ = layers[0][0].shape
        if batch in self._eager or batch > BATCH_SIZES[-1]:
            return super()._run(step, layers, *inputs)
        is_new, began = (step, batch, length) not in self._ready, time.monotonic()
        if is_new:
            self._say(f"compiling {step.__name__} for a batch of {batch}, {length} columns: minutes the first time")
        try:
            torch.compiler.cudagraph_mark_step_begin()
            # cloned: the next pass fills a graph's own tensors anew
            outputs = tuple(tensor.clone() for tensor in self._compiled(step)(self.vla, layers, *inputs))
        except Exception as error:  # no memory, no compiler, not compilable: all have names of their own
            failed = error.with_traceback(None)
        else:
            if is_new:
                self._say(f"compiled {step.__name__} for a batch of {batch} in {time.monotonic() - began:.0f} s")
                self._ready.add((step, batch, length))
            return outputs
        outputs = super()._run(step, layers, *inputs)  # raises what is no compiler's fault
        self._eager[batch] = (str(failed).strip() or type(failed).__name__).partition("\n")[0]
        self._say(f"notice: a batch of {batch} can't be compiled and is decoded eagerly: {self._eager[batch]}")
        return outputs


def decoder_for(vla: Any, *, compilable: bool = True) -> ActionDecoder:
    """The decoder of a model that will act, which takes no gradients any more: compiled on a GPU, eager on a CPU.

    compilable False: its layers ask the device as they go along (bitsandbytes').
    """
    vla.eval().requires_grad_(False)
    if compilable and next(vla.parameters()).device.type == "cuda":
        return CompiledActionDecoder(vla)
    return ActionDecoder(vla)
