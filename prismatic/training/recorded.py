"""A training pass, forward and back, recorded once as a CUDA graph and replayed: one call starts its thousands of kernels.

In: a VLA that takes gradients, and a run's batches. Out: loss and logits; gradients are added to those that are there. At a small micro-batch
a fast GPU is done with a kernel before Python has named the next. A graph has fixed shapes and addresses: rows are padded to one width
(nothing reads padding), the labels' columns are found before the pass, gradients are set to zero and never dropped.

Surprising: the run's first step is not recorded. At the second, the graph must give the loss and the gradients' norms that two batches gave
without it; where it doesn't, or can't be recorded, that is said once and every pass is run as it would be without this file.
"""

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.models.captured import record_graph
from prismatic.models.vla import IGNORE, VLA
from prismatic.processor import Batch
from prismatic.training.distributed import Ranks
from prismatic.training.step import one_pass

TOLERANCE = 0.01  # relative, of loss and norms: kernels that add in another order each time differ by less, a stale input by more

Answer = tuple[torch.Tensor, torch.Tensor]  # loss (), logits (labels that count, rows)
Pass = Callable[[], Answer]


class Recorder:
    """Where passes are recorded, and run before that: autograd may remember the stream on which it met a parameter."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def run(self, work: Pass) -> Answer:
        """Its answer, now."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            answer = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return answer

    def record(self, work: Pass) -> Pass:
        """What replays it."""
        return record_graph(work, self.stream)


@dataclass(frozen=True)
class Inputs:
    """A padded batch, and where in each row's labels[1:] those are that count: (B, N) int64."""

    batch: Batch
    label_columns: torch.Tensor

    def to(self, device: torch.device) -> "Inputs":
        return Inputs(self.batch.to(device), self.label_columns.to(device, non_blocking=True))

    def clone(self) -> "Inputs":
        *batch, columns = (tensor.clone() for tensor in self.tensors())
        return Inputs(Batch(*batch), columns)

    def tensors(self) -> list[torch.Tensor]:
        return [*(getattr(self.batch, field.name) for field in fields(Batch)), self.label_columns]

    def shapes(self) -> list[torch.Size]:
        return [tensor.shape for tensor in self.tensors()]


def padded(batch: Batch, words: int, pad_token_id: int) -> Inputs | None:
    """batch with rows of `words` ids. None where its rows are longer, or have different numbers of labels."""
    surplus = words - batch.input_ids.shape[1]
    counts = batch.labels[:, 1:] != IGNORE
    each = counts.sum(dim=1)
    if surplus < 0 or each.unique().numel() != 1:
        return None
    ids = F.pad(batch.input_ids, (0, surplus), value=pad_token_id)
    labels = F.pad(batch.labels, (0, surplus), value=IGNORE)
    mask = F.pad(batch.attention_mask, (0, surplus), value=False)
    columns = counts.nonzero()[:, 1].view(len(ids), int(each[0]))
    return Inputs(Batch(ids, labels, mask, batch.pixel_values), columns)


class RecordedPass:
    """`recorded(batch)` → loss, logits, of a batch on the host; the answer's tensors are filled anew by the next call.

    words: ids of the run's longest row. passes: of a step, each of which is called here. Gradients belong to this object: set them to zero
    after a step, in place.
    """

    def __init__(self, vla: VLA, *, words: int, passes: int, autocast: bool, recorder: Recorder | None = None) -> None:
        self.vla, self.words, self.passes, self.autocast = vla, words, passes, autocast
        self.recorder = recorder or Recorder()
        self.device = next(vla.parameters()).device
        self.given_up = ""  # why, if it was
        self._calls = 0
        self._first: Inputs | None = None
        self._inputs: Inputs | None = None  # what the graph reads
        self._play: Pass | None = None
        unread = set(vla.unread_parameters())  # without a gradient the optimizer leaves them alone
        self._gradients: list[torch.Tensor] = []
        for name, parameter in vla.named_parameters():
            if parameter.requires_grad and name not in unread:
                parameter.grad = torch.zeros_like(parameter)
                self._gradients.append(parameter.grad)

    @property
    def is_recorded(self) -> bool:
        """Whether passes are replayed by now."""
        return self._play is not None

    def __call__(self, batch: Batch) -> Answer:
        inputs = padded(batch, self.words, self.vla.config.pad_token_id)
        begins_second_step = self._calls == self.passes
        self._calls += 1
        if inputs is None:
            return one_pass(self.vla, batch.to(self.device), passes=self.passes, autocast=self.autocast)
        if self._first is None:
            self._first = inputs
        if begins_second_step and inputs.shapes() == self._first.shapes():
            self._begin([self._first, inputs])
        if self._inputs is not None and inputs.shapes() == self._inputs.shapes():
            return self._replay(inputs)
        answer = self._run(inputs)
        if self._calls == self.passes:
            _give_back()  # else the optimizer's state, made next, would lie in pieces of what the activations had
        return answer

    def _begin(self, examples: list[Inputs]) -> None:
        """Record, and check; gradients are zero before and after."""
        try:
            expected = [self._probe(lambda inputs=inputs: self._run(inputs)) for inputs in examples]
            self._inputs = fixed = examples[0].to(self.device).clone()
            self._play = self.recorder.record(lambda: self._pass(fixed))
            found = [self._probe(lambda inputs=inputs: self._replay(inputs)) for inputs in examples]
            differs = max(map(_difference, found, expected))
            reason = "" if differs <= TOLERANCE else f"the recorded pass differs from the plain one by {differs:.1%}"
        except Exception as error:  # out of memory, what can't be recorded: all have names of their own
            reason = str(error) or type(error).__name__
        if reason:
            self._give_up(reason)

    def _probe(self, run: Pass) -> torch.Tensor:
        """The loss that a pass gives and the norm of each gradient, which is zero again then."""
        loss, _ = run()
        numbers = torch.stack([loss.float(), *(gradient.norm().float() for gradient in self._gradients)]).cpu()
        self._zero()
        return numbers

    def _run(self, inputs: Inputs) -> Answer:
        on_device = inputs.to(self.device)
        return self.recorder.run(lambda: self._pass(on_device))

    def _pass(self, inputs: Inputs) -> Answer:
        columns = inputs.label_columns
        return one_pass(self.vla, inputs.batch, passes=self.passes, autocast=self.autocast, label_columns=columns)

    def _replay(self, inputs: Inputs) -> Answer:
        assert self._inputs is not None and self._play is not None
        for fixed, new in zip(self._inputs.tensors(), inputs.tensors(), strict=True):
            fixed.copy_(new, non_blocking=True)
        return self._play()

    def _zero(self) -> None:
        for gradient in self._gradients:
            gradient.zero_()

    def _give_up(self, reason: str) -> None:
        self.given_up = reason
        self._inputs = self._play = None
        self._zero()  # of a pass that broke off
        _give_back()
        warnings.warn(f"training passes are not recorded, each is started by itself: {reason}", stacklevel=4)


def record_passes(vla: VLA, ranks: Ranks, *, words: int, passes: int, autocast: bool) -> RecordedPass | None:
    """For one GPU, and a model that draws no random numbers: a replay and the pass it is checked against would draw others. Else None, said."""
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in vla.modules())
    if ranks.device == "cpu" or ranks.size > 1 or draws:
        print("notice: --cuda_graph is for one GPU and no dropout: passes are not recorded")
        return None
    return RecordedPass(vla, words=words, passes=passes, autocast=autocast)


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The larger of the relative difference of the losses and that of the norms together; 0 where both are not finite."""
    found, expected = (numbers.double().nan_to_num(0.0, 0.0, 0.0) for numbers in (found, expected))
    parts = [(found[:1], expected[:1]), (found[1:], expected[1:])]
    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in parts)
