"""A built model made ready to act fast: on a GPU its passes are compiled and recorded as CUDA graphs; on a CPU oneDNN multiplies (onednn.py).

A decoding pass is a thousand small kernels, which a GPU runs faster than Python can name them; a recorded graph is started with one call.
The model itself stays as it was: compiled are layers of its own, on the same weights, so whatever else asks the model is not compiled anew for it.
A graph has fixed shapes, so prompts are padded to a multiple of WIDTH words and batches to a power of two. Padding changes no answer: nothing
reads a padded word, and padded rows are dropped.
"""

import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.models.decode import Answer, Decoder, Decoding, Passes
from prismatic.models.onednn import twin_of, usable, with_onednn
from prismatic.models.vla import VLA

WIDTH = 32  # words
MAX_BATCH = 64  # rows; larger batches are decoded as they come
KEPT = 8  # shapes whose graphs and caches are kept; the one unused for longest goes first
WARM_UP = 3  # calls before recording: kernels are compiled and chosen, libraries allocate their workspaces
COMPILE_MODE = "max-autotune-no-cudagraphs"  # the graphs are recorded here
VARIANTS = 256  # shapes that one layer may be compiled for: each shape above has six

Record = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
T = TypeVar("T")


def capture(vla: VLA) -> Decoder:
    """The decoder of a model that will act (after adapters are merged and weights quantised), which no longer takes gradients
    and drops nothing out.
    """
    vla.eval().requires_grad_(False)  # before any twin is made: a twin keeps the mode that it was made in
    if next(vla.parameters()).device.type == "cuda":
        return CapturedDecoder(vla, compile_layers(vla, mode=COMPILE_MODE))
    return Decoder(with_onednn(vla) if usable() else vla)


def compile_layers(vla: VLA, **how: Any) -> VLA:
    """The same weights under layers of the language model that are compiled, one by one: they share their code, so each shape is compiled once.

    how: torch.compile's options. vla stays as it is.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    twin = twin_of(vla)
    twin.language_model = twin_of(vla.language_model)
    twin.language_model.model = twin_of(vla.language_model.model)
    layers = [twin_of(layer) for layer in vla.language_model.model.layers]
    twin.language_model.model.layers = nn.ModuleList(layers)
    for layer in layers:
        layer.compile(dynamic=False, **how)
    return twin


def record_graph(function: Callable[[], T], stream: torch.cuda.Stream | None = None) -> Callable[[], T]:
    """Record what function puts on the GPU; the result replays it and returns the same tensors each time, filled anew.

    stream: on which it is recorded; torch's own for that if None.
    """
    graph = torch.cuda.CUDAGraph()
    # what other threads do meanwhile, such as a loader's that pins memory, is none of its business
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = function()

    def play() -> T:
        graph.replay()
        return result

    return play


def warm_up_and_record(function: Callable[[], T]) -> Callable[[], T]:
    """record_graph of a function that has not run yet."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    return record_graph(function)


class Recorded:
    """A Decoding whose passes are recorded the first time they are asked for."""

    def __init__(self, decoding: Decoding, record: Record) -> None:
        self.decoding, self.record = decoding, record
        self.answer, self.lead, self.action_dim = decoding.answer, decoding.lead, decoding.action_dim
        self._recorded: dict[str, Callable[[], torch.Tensor]] = {}

    def plain(self) -> torch.Tensor:
        return self._play("plain")

    def first(self) -> torch.Tensor:
        return self._play("first")

    def again(self, start: int = 0) -> torch.Tensor:
        """All columns, whatever start: one graph serves, and a GPU that waits for weights reads six columns as fast as one."""
        return self._play("again")

    def _play(self, name: str) -> torch.Tensor:
        if name not in self._recorded:
            before = self.answer.clone()
            self._recorded[name] = self.record(getattr(self.decoding, name))
            self.answer.copy_(before)  # warming up has run the pass
        return self._recorded[name]()


class CapturedDecoder(Decoder):
    """Decodes from recorded passes; where compiling or recording fails it says so once and decodes pass by pass from then on.

    compiled: the model whose passes are recorded, on vla's weights; None: vla itself.
    """

    def __init__(self, vla: VLA, compiled: VLA | None = None, *, record: Record = warm_up_and_record) -> None:
        super().__init__(vla)
        self.compiled, self.record = compiled or vla, record
        self._shapes: OrderedDict[tuple[int, ...], Recorded] = OrderedDict()
        self._broken = False

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        action_dim: int,
        attention_mask: torch.Tensor | None = None,
        draft: torch.Tensor | None = None,
    ) -> Answer:
        """As Decoder's."""
        rows, words = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        surplus = (1 << (rows - 1).bit_length()) - rows if rows <= MAX_BATCH else 0

        def widened(rows_of: torch.Tensor) -> torch.Tensor:
            return torch.cat([rows_of, rows_of[:1].expand(surplus, *rows_of.shape[1:])])

        inputs = (
            widened(F.pad(input_ids, (0, -words % WIDTH), value=self.vla.config.pad_token_id)),
            widened(pixel_values),
            action_dim,
            widened(F.pad(attention_mask, (0, -words % WIDTH))),
            None if draft is None else widened(draft),
        )
        answer, reason = None, ""
        try:
            answer = super().__call__(*inputs)
        except Exception as error:  # out of memory, no compiler, what can't be recorded: all have names of their own
            if self._broken:
                raise
            reason = str(error)
        if answer is None:  # the error is gone by now, and with it what it held
            self._give_up(reason)
            answer = super().__call__(*inputs)
        # a graph's own tensors are filled anew by the next call
        kept = {name: getattr(answer, name)[:rows].clone() for name in ("ids", "lead", "doubtful")}
        return replace(answer, **kept)

    def _give_up(self, reason: str) -> None:
        self._broken = True
        self._shapes.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"decoding is not captured, each pass is started by itself: {reason}", stacklevel=3)

    def _passes(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, pixel_values: torch.Tensor, action_dim: int
    ) -> Passes:
        if self._broken or len(input_ids) > MAX_BATCH:
            return super()._passes(input_ids, lengths, pixel_values, action_dim)
        key = (*input_ids.shape, *pixel_values.shape, action_dim)
        if key not in self._shapes:
            while len(self._shapes) >= KEPT:
                self._shapes.popitem(last=False)
            decoding = Decoding(self.compiled, input_ids.clone(), lengths.clone(), pixel_values.clone(), action_dim)
            self._shapes[key] = Recorded(decoding, self.record)
        self._shapes.move_to_end(key)
        decoding = self._shapes[key].decoding
        decoding.words.copy_(input_ids)
        decoding.lengths.copy_(lengths)
        decoding.pixel_values.copy_(pixel_values)
        return self._shapes[key]
