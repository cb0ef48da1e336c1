"""A built model made ready to act fast: on a GPU its passes are compiled and recorded as CUDA graphs; on a CPU oneDNN multiplies (onednn.py).

A decoding pass is a thousand small kernels, which a GPU runs faster than Python can name them; a recorded graph is started with one call.
The model itself stays as it was: compiled are layers of its own, on the same weights, so whatever else asks the model is not compiled anew for it.
A graph has fixed shapes, so prompts are padded to a multiple of WIDTH words and batches to a power of two. Padding changes no answer: nothing
reads a padded word, and padded rows are dropped.
"""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.models.decode import Answer, Decoder, Decoding, Passes
from prismatic.models.graphs import Recorder, first_reason, give_back, is_memory, on
from prismatic.models.onednn import twin_of, usable, with_onednn
from prismatic.models.vla import VLA

WIDTH = 32  # words
MAX_BATCH = 64  # rows; larger batches are decoded as they come
KEPT = 8  # shapes whose graphs and caches are kept; the one unused for longest goes first
WARM_UP = 3  # calls before recording: kernels are compiled and chosen, libraries allocate their workspaces
COMPILE_MODE = "max-autotune-no-cudagraphs"  # the graphs are recorded here
VARIANTS = 256  # shapes that one layer may be compiled for: each shape above has six
ALIKE = 0.05  # relative, and absolute in logits: leads of a replayed pass to those of the same pass started kernel by kernel


def capture(vla: VLA, *, graphs: bool = True) -> Decoder:
    """The decoder of a model that will act (after adapters are merged and weights quantised), which no longer takes gradients
    and drops nothing out. graphs False: its layers can't be recorded.
    """
    vla.eval().requires_grad_(False)  # before any twin is made: a twin keeps the mode that it was made in
    if next(vla.parameters()).device.type == "cuda":
        return CapturedDecoder(vla, compile_layers(vla, mode=COMPILE_MODE)) if graphs else Decoder(vla)
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


class Recorded:
    """A Decoding whose passes are recorded the first time they are asked for. RuntimeError where a recording answers otherwise than its pass."""

    def __init__(self, decoding: Decoding, recorder: Recorder) -> None:
        self.decoding, self.recorder = decoding, recorder
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
            work: Callable[[], torch.Tensor] = getattr(self.decoding, name)
            before, lead = self.answer.clone(), self.lead.clone()
            for _ in range(WARM_UP):
                self.recorder.run(work)
            play = self.recorder.record(work)
            self._check(work, play, before)
            self._recorded[name] = play
            self.answer.copy_(before)  # the passes that were run have changed both
            self.lead.copy_(lead)
        return self._recorded[name]()

    def _check(self, work: Callable[[], torch.Tensor], play: Callable[[], torch.Tensor], before: torch.Tensor) -> None:
        """Of another input, then of this one: a graph that is empty, or holds what it was recorded with, can't answer both."""
        decoding = self.decoding
        ids = decoding.last_id - decoding.first_id
        other = decoding.first_id + (before - decoding.first_id + 1) % ids

        def answered(run: Callable[[], torch.Tensor], draft: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
            self.answer.copy_(draft)
            self.lead.fill_(-1)
            return [run().clone(), self.answer.clone()], self.lead.clone()

        for draft, by in ((other, 1), (before, -1)):
            decoding.pixel_values.neg_()
            decoding.words.copy_(decoding.words.roll(by, dims=1))
            decoding.lengths.sub_(by)
            words, lead = answered(lambda: self.recorder.run(work), draft)
            found, found_lead = answered(play, draft)
            close = torch.allclose(found_lead, lead, rtol=ALIKE, atol=ALIKE, equal_nan=True)
            if not (close and all(map(torch.equal, found, words))):
                raise RuntimeError("a recorded pass answers otherwise than the pass itself")


class CapturedDecoder(Decoder):
    """Decodes from recorded passes. Where compiling fails it records what is not compiled, where recording fails it decodes pass by pass, and
    a shape for which there is no memory is decoded so by itself; each is said once.

    compiled: the model whose passes are recorded, on vla's weights; None: vla itself.
    """

    def __init__(self, vla: VLA, compiled: VLA | None = None, *, recorder: Recorder | None = None) -> None:
        super().__init__(vla)
        self.device = next(vla.parameters()).device
        # to be recorded: the first, or if that fails the next
        self.models = [vla] if compiled is None else [compiled, vla]
        self.given_up: list[str] = []  # what, and why
        self._recorder = recorder
        self._shapes: OrderedDict[tuple[int, ...], Recorded] = OrderedDict()
        self._too_large: set[tuple[int, ...]] = set()
        self._made_room = False

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
        with on(self.device):
            answer = self._answer(inputs)
        # a graph's own tensors are filled anew by the next call
        kept = {name: getattr(answer, name)[:rows].clone() for name in ("ids", "lead", "doubtful")}
        return replace(answer, **kept)

    def _answer(self, inputs: tuple[Any, ...]) -> Answer:
        """From recorded passes if they can be had. What plain decoding can't do either is raised, and no recording's fault."""
        handled = sys.exception()
        kept = list(self.models), list(self.given_up), set(self._too_large)
        shape = _shape(*inputs[:3])
        while True:
            try:
                return super().__call__(*inputs)
            except Exception as error:  # no memory, no compiler, not recordable: all have names of their own
                if not self._captures(shape):
                    self.models, self.given_up, self._too_large = kept
                    raise
                failed = first_reason(error, handled).with_traceback(None)
            self._fall_back(shape, failed)  # the error is gone by now, and with it what it held

    def _captures(self, shape: tuple[int, ...]) -> bool:
        return bool(self.models) and shape not in self._too_large and shape[0] <= MAX_BATCH

    def _fall_back(self, shape: tuple[int, ...], error: BaseException) -> None:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if not is_memory(error):
            self.models.pop(0)
            self._shapes.clear()
            what = "not compiled" if self.models else "not captured, each pass is started by itself"
        elif len(self._shapes) > 1 and not self._made_room:  # once: else two shapes would drive each other out for ever
            self._made_room = True
            self._shapes.clear()
            give_back()
            return
        else:
            self._shapes.pop(shape, None)
            self._too_large.add(shape)
            what = f"not captured for a batch of {shape[0]}"
        give_back()
        self.given_up.append(f"{what}: {reason}")
        warnings.warn(f"decoding is {self.given_up[-1]}", stacklevel=3)

    def _passes(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, pixel_values: torch.Tensor, action_dim: int
    ) -> Passes:
        key = _shape(input_ids, pixel_values, action_dim)
        if not self._captures(key):
            return super()._passes(input_ids, lengths, pixel_values, action_dim)
        if key not in self._shapes:
            while len(self._shapes) >= KEPT:
                self._shapes.popitem(last=False)
            decoding = Decoding(self.models[0], input_ids.clone(), lengths.clone(), pixel_values.clone(), action_dim)
            self._recorder = self._recorder or Recorder()
            self._shapes[key] = Recorded(decoding, self._recorder)
        self._shapes.move_to_end(key)
        decoding = self._shapes[key].decoding
        decoding.words.copy_(input_ids)
        decoding.lengths.copy_(lengths)
        decoding.pixel_values.copy_(pixel_values)
        return self._shapes[key]


def _shape(input_ids: torch.Tensor, pixel_values: torch.Tensor, action_dim: int) -> tuple[int, ...]:
    """What a recording is of, rows first."""
    return (*input_ids.shape, *pixel_values.shape, action_dim)
