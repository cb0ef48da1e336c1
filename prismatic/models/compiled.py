"""Decoding through torch.compile, for a model that acts on a GPU (after adapters are merged and weights quantised).

A forward pass is a thousand small kernels, which a GPU runs faster than Python can name them. torch.compile fuses them and records the rest as a
CUDA graph (mode "reduce-overhead"), once for each shape: prompts are padded to a multiple of 64 tokens; batches are cut into, and padded to,
those of BATCH_SIZES. Padding changes no token, and a regression's numbers by rounding alone: nothing reads a padded token, and padded rows are
dropped. All shapes share one key-value cache.

Surprising: a shape's first use takes minutes (torch keeps what it compiled in its own cache, so the next run is faster) and says so. What
can't be compiled runs eagerly, which is said once and stands in `description`. Compiled passes have never run on a GPU.
"""

import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from prismatic.models.decode import ActionDecoder, Answer, Layers, Tensors, with_empty_token

PROMPT_WIDTH = 64  # tokens: holds every instruction of LIBERO with the prompt around it; WIDEST is the second width
WIDEST = 128
# of a row at full size while its prompt is read, what graphs keep included; not measured
ACTIVATION_BYTES = 120_000_000
BATCH_SIZES = (1, 4, 16, 32, 64)  # rows
NO_GRAPHS = "without CUDA graphs, which torch left out"
write_line = partial(tqdm.write, file=sys.stderr)
VARIANTS = 64  # that torch may compile of one function: its own limit, 8, is less than two widths of five sizes


def variants() -> dict[str, Any]:
    """torch.compile's limit of VARIANTS: given to it, it holds in every thread, torch's configuration in one."""
    # not in torch 2.11; torch's own types leave it out
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": VARIANTS}
    torch._dynamo.config.recompile_limit = VARIANTS
    return {}


def compile_step(step: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """The function as a CUDA graph."""
    return torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False, **variants())


def graphs_left_out() -> int:
    """How often torch compiled something without recording it as a CUDA graph, which it only logs."""
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def widest(config: Any, action_dim: int = 0) -> int:
    """Columns of the cache at the second prompt width, for answers as long as the config says, or action_dim: a token head takes any."""
    return config.num_images_in_input * config.num_patches + WIDEST + max(config.action_positions, action_dim)


def batches(rows: int) -> Iterator[int]:
    """Sizes of the batches that so many rows are decoded in. Of each a quarter at the most is padding: prompts cost a GPU by the row."""
    while rows > 0:
        fitting = (size for size in BATCH_SIZES if rows <= size <= rows * 4 // 3)
        yield (size := next(fitting, max(size for size in BATCH_SIZES if size <= rows)))
        rows -= size


def _name(batch: int) -> str:
    return f"a batch of {batch}"


def padded(
    vla: Any, input_ids: Tensor, attention_mask: Tensor | None, *others: Tensor | None
) -> Iterator[tuple[Any, ...]]:
    """Batches of the compiled shapes: ids and mask (size, a multiple of PROMPT_WIDTH), others (size, …) or None; the first row fills up."""
    rows, more = len(input_ids), -input_ids.shape[1] % PROMPT_WIDTH
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
    ids, mask, start = F.pad(input_ids, (0, more), value=vla.config.pad_token_id), F.pad(mask, (0, more)), 0
    for size in batches(rows):
        part, filling = slice(start, start + size), max(start + size - rows, 0)
        yield tuple(
            None if one is None else torch.cat([one[part], one[:1].expand(filling, *one.shape[1:])])
            for one in (ids, mask, *others)
        )
        start += size


def read_chunk(
    vla: Any, _: Layers, input_ids: Tensor, lengths: Tensor, pixel_values: Tensor, *proprio: Tensor
) -> Tensors:
    """VLA.answer to prompts (B, T) of `lengths` tokens, in one forward pass that waits for nothing and is masked."""
    empty, pad = vla.config.empty_token_id, vla.config.pad_token_id
    input_ids, lengths = with_empty_token(input_ids, lengths, empty=empty, pad=pad)
    return vla.answer(vla.before_actions(input_ids, lengths, pixel_values, proprio[0] if proprio else None, True))


class CompiledActionDecoder(ActionDecoder):
    """An ActionDecoder of compiled forward passes.

    compiler: turns a function into a compiled one, when it is first called. say: is given one line when something is compiled, or can't be.
    """

    def __init__(
        self,
        vla: Any,
        *,
        compiler: Callable[[Callable[..., Tensors]], Callable[..., Tensors]] = compile_step,
        say: Callable[[str], object] = write_line,
    ) -> None:
        super().__init__(vla)
        self._say, self._compiled = say, functools.cache(compiler)
        self._views: dict[tuple[int, int], Layers] = {}  # of the cache, by (batch, length)
        self._ready: set[Any] = set()  # (step, batch, columns) that were compiled
        self._eager: dict[str, str] = {}  # what can't be compiled → why
        self._has_graphs = True
        self._action_dim = 0  # of the last answer

    @property
    def description(self) -> str:
        """How forward passes are run, and what is not compiled for which reason."""
        how = "compiled" if self._has_graphs else f"compiled {NO_GRAPHS}"
        compiled = [how] * (bool(self._ready) or not self._eager)
        return "; ".join(compiled + [f"eager for {what}: {why}" for what, why in self._eager.items()])

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        action_dim: int,
        attention_mask: Tensor | None = None,
        draft: Tensor | None = None,
    ) -> Answer:
        """As ActionDecoder's."""
        self._action_dim = action_dim
        if self._is_wide(input_ids):
            return self._wide(input_ids, pixel_values, action_dim, attention_mask, draft)
        answers = []
        for ids, mask, pixels, guess in padded(self.vla, input_ids, attention_mask, pixel_values, draft):
            answers.append(super().__call__(ids, pixels, action_dim, mask, guess))
        ids, margins = (torch.cat([getattr(a, name) for a in answers])[: len(input_ids)] for name in ("ids", "margins"))
        return Answer(ids, margins, sum(answer.forward_passes for answer in answers))

    def _wide(self, ids: Tensor, pixels: Tensor, action_dim: int, mask: Tensor | None, draft: Tensor | None) -> Answer:
        """A batch with wide prompts: those row by row, since a cache of their width for all would not fit beside the one that is held; the others
        together, as ever.
        """
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        wide, eager = mask.sum(dim=1) > WIDEST, ActionDecoder(self.vla)
        parts, answers = [(row, eager, ids.shape[1]) for row in wide.nonzero()], []
        if not wide.all():
            parts.append(((~wide).nonzero()[:, 0], self, WIDEST))
        for rows, decode, width in parts:
            guess = None if draft is None else draft[rows.to(draft.device)]
            answers.append(decode(ids[rows, :width], pixels[rows], action_dim, mask[rows, :width], guess))
        back = torch.cat([rows for rows, *_ in parts]).argsort()
        found, margins = (torch.cat([getattr(answer, name) for answer in answers])[back] for name in ("ids", "margins"))
        return Answer(found, margins, sum(answer.forward_passes for answer in answers))

    @torch.inference_mode()
    def chunk(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        proprio: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Answer:
        """As ActionDecoder's, which it is where a batch can't be compiled: unpadded, in one pass."""
        sizes = list(batches(len(input_ids)))
        if self._is_wide(input_ids) or any(_name(size) in self._eager for size in sizes):
            return super().chunk(input_ids, pixel_values, proprio, attention_mask)
        answers = []
        for ids, mask, pixels, state in padded(self.vla, input_ids, attention_mask, pixel_values, proprio):
            answers.append(self._run(read_chunk, [], ids, mask.sum(dim=1), pixels, *([] if state is None else [state])))
        answer, margins = (torch.cat(parts)[: len(input_ids)] for parts in zip(*answers, strict=True))
        return Answer(answer, margins, len(sizes))

    def _is_wide(self, input_ids: Tensor) -> bool:
        if is_wide := input_ids.shape[1] > WIDEST:
            self._give_up(f"prompts of more than {WIDEST} tokens", "each width would be compiled anew")
        return is_wide

    def _layers(self, batch: int, length: int) -> Layers:
        """The same views each time: a CUDA graph remembers addresses."""
        layers = super()._layers(batch, length)
        if (batch, length) not in self._views:
            for tensor in (part for layer in layers for part in layer):
                torch._dynamo.mark_static_address(tensor, guard=False)  # else each pass would copy the cache
            self._views[batch, length] = layers
        return self._views[batch, length]

    def _grow(self, rows: int, columns: int) -> None:
        """Wide enough for both prompt widths from the start: other strides would be compiled anew, more rows are only recorded anew."""
        self._views.clear()
        super()._grow(rows, max(columns, widest(self.vla.config, self._action_dim)))

    def _run(self, step: Any, layers: Layers, *inputs: Tensor) -> Tensors:
        if (what := _name(len(inputs[0]))) in self._eager:
            return super()._run(step, layers, *inputs)
        columns = layers[0][0].shape[2] if layers else inputs[0].shape[1]
        shape = step, len(inputs[0]), columns
        is_new, began, left_out = shape not in self._ready, time.monotonic(), graphs_left_out()
        if is_new:
            self._say(f"compiling {step.__name__} for {what}, {columns} columns: minutes the first time")
        try:
            torch.compiler.cudagraph_mark_step_begin()
            # cloned: the next pass fills a graph's own tensors anew
            outputs = tuple(tensor.clone() for tensor in self._compiled(step)(self.vla, layers, *inputs))
        except Exception as error:  # no memory, no compiler, not compilable: all have names of their own
            failed = error.with_traceback(None)
        else:
            if self._has_graphs and graphs_left_out() > left_out:
                self._has_graphs = False
                self._say(f"notice: {what} is decoded {NO_GRAPHS}: slower than it could be")
            if is_new:
                self._say(f"compiled {step.__name__} for {what} in {time.monotonic() - began:.0f} s")
                self._ready.add(shape)
            return outputs
        outputs = super()._run(step, layers, *inputs)  # raises what is no compiler's fault
        self._give_up(what, (str(failed).strip() or type(failed).__name__).partition("\n")[0])
        return outputs

    def _give_up(self, what: str, why: str) -> None:
        if what not in self._eager:
            self._eager[what] = why
            self._say(f"notice: {what} can't be compiled and is decoded eagerly: {why}")


def memory_for(vla: Any, rows: int) -> int:
    """Bytes beside the weights that answering so many rows at once takes, about: activations, and keys and values where tokens are decoded."""
    config, text, size = vla.config, vla.config.text_config, next(vla.parameters()).element_size()
    width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    cached = max(rows, *batches(rows)) * (config.action_head == "tokens")  # an eager decoder reads all rows at once
    return rows * ACTIVATION_BYTES + cached * 2 * text.num_hidden_layers * widest(config) * width * size


def decoder_for(vla: Any, *, compilable: bool = True) -> ActionDecoder:
    """The decoder of a model that will act, which takes no gradients any more: compiled on a GPU, eager on a CPU.

    compilable False: its layers ask the device as they go along (bitsandbytes').
    """
    vla.eval().requires_grad_(False)
    if compilable and next(vla.parameters()).device.type == "cuda":
        return CompiledActionDecoder(vla)
    return ActionDecoder(vla)
