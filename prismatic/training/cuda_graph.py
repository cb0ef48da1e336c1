"""A training pass, forward and back, recorded once as a CUDA graph and replayed: one call starts its thousands of kernels.

In: a VLA that takes gradients, and a run's batches. Out: loss and logits; gradients are added to those that are there. At a small micro-batch
a fast GPU is done with a kernel before Python has named the next. A graph has fixed shapes and addresses: rows are padded to one width
(nothing reads padding), the labels' columns are found before the pass, gradients are set to zero and never dropped.

Surprising: the first step after a start is not recorded. At the second, the graph must give the loss and the norm of every gradient that two
batches gave without it; where it doesn't, or can't be recorded, the run ends there, at its second step, and says so.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from prismatic.errors import ConfigError
from prismatic.models.graphs import Recorder, first_reason, give_back, on
from prismatic.models.vla import IGNORE, VLA
from prismatic.processor import MAX_LENGTH, Batch, Processor
from prismatic.training.distributed import Ranks
from prismatic.training.step import one_pass

TOLERANCE = 0.01  # relative, of the loss and of each norm
NOISE = 4  # times what the plain pass differs from itself comes on top

Answer = tuple[torch.Tensor, torch.Tensor]  # loss (), logits (labels that count, rows)
Pass = Callable[[], Answer]


class CannotRecord(ConfigError):
    """Why not, in one sentence; __cause__ is what torch raised, if it did."""


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


def padded(batch: Batch, words: int, pad_token_id: int) -> Inputs:
    """batch with rows of `words` ids. ValueError where its rows are longer, or have different numbers of labels."""
    surplus = words - batch.input_ids.shape[1]
    counts = batch.labels[:, 1:] != IGNORE
    each = counts.sum(dim=1)
    if surplus < 0 or each.unique().numel() != 1:
        raise ValueError(
            f"rows of {batch.input_ids.shape[1]} ids with {each.tolist()} labels don't fit a graph of {words}"
        )
    ids = F.pad(batch.input_ids, (0, surplus), value=pad_token_id)
    labels = F.pad(batch.labels, (0, surplus), value=IGNORE)
    mask = F.pad(batch.attention_mask, (0, surplus), value=False)
    columns = counts.nonzero()[:, 1].view(len(ids), int(each[0]))
    return Inputs(Batch(ids, labels, mask, batch.pixel_values), columns)


class GraphedPass:
    """`graphed(batch)` → loss, logits, of a batch on the host; the answer's tensors are filled anew by the next call.

    words: ids of the run's longest row. passes: of a step, each of which is called here; all batches have one size. Gradients belong to this
    object: set them to zero after a step, in place.
    """

    def __init__(self, vla: VLA, *, words: int, passes: int, autocast: bool, recorder: Recorder | None = None) -> None:
        self.vla, self.words, self.passes, self.autocast = vla, words, passes, autocast
        self.device = next(vla.parameters()).device
        with on(self.device):
            self.recorder = recorder or Recorder()
        self._calls = 0
        self._first: Inputs | None = None
        self._inputs: Inputs | None = None  # what the graph reads
        self._play: Pass | None = None
        unread = set(vla.unread_parameters())  # without a gradient the optimizer leaves them alone
        named = {n: p for n, p in vla.named_parameters() if p.requires_grad and n not in unread}
        self._gradients = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
        for name, parameter in named.items():
            parameter.grad = self._gradients[name]
        self._trained = list(named.values())

    @property
    def is_recorded(self) -> bool:
        """Whether passes are replayed by now."""
        return self._play is not None

    def __call__(self, batch: Batch) -> Answer:
        inputs = padded(batch, self.words, self.vla.config.pad_token_id)
        if any(p.grad is not g for p, g in zip(self._trained, self._gradients.values(), strict=True)):
            raise RuntimeError(
                "gradients were taken away from the graph that adds to them: zero_grad(set_to_none=False)"
            )
        if self._first is None:
            self._first = inputs
        if self._calls == self.passes:
            self._begin([self._first, inputs])
        self._calls += 1
        if self._play is not None:
            return self._replay(inputs)
        answer = self._run(inputs)
        if self._calls == self.passes:
            give_back()  # else the optimizer's state, made next, would lie in pieces of what the activations had
        return answer

    def _begin(self, examples: list[Inputs]) -> None:
        """Record, and check; gradients are zero before and after."""
        twice = [[self._probe(self._run, inputs) for inputs in examples] for _ in range(2)]
        noise = torch.stack([(once - again).abs() for once, again in zip(*twice, strict=True)]).nan_to_num(0.0)
        give_back()
        handled = sys.exception()
        try:
            self._inputs = fixed = examples[0].to(self.device).clone()
            self._play = self.recorder.record(lambda: self._pass(fixed))
            found = [self._probe(self._replay, inputs) for inputs in examples]
        except Exception as error:  # out of memory, what can't be recorded: all have names of their own
            cause = first_reason(error, handled)
            what = str(cause).partition("\n")[0] or type(cause).__name__
            raise CannotRecord(f"a training pass can't be recorded ({what}): leave out --cuda_graph") from cause
        for got, right in zip(found, twice[0], strict=True):
            self._compare(got, right, noise.amax(dim=0))

    def _probe(self, run: Callable[[Inputs], Answer], inputs: Inputs) -> torch.Tensor:
        """The loss that a pass gives and the norm of each gradient, which is zero again then."""
        loss, _ = run(inputs)
        norms = [gradient.norm(dtype=torch.float32).double() for gradient in self._gradients.values()]
        numbers = torch.stack([loss.double(), *norms]).cpu()
        for gradient in self._gradients.values():
            gradient.zero_()
        return numbers

    def _compare(self, found: torch.Tensor, expected: torch.Tensor, noise: torch.Tensor) -> None:
        """CannotRecord that names the first number that differs. Where neither is finite there is nothing to compare."""
        limit = TOLERANCE * expected.abs() + NOISE * noise
        alike = ((found - expected).abs() <= limit) | ~(found.isfinite() | expected.isfinite())
        for name, same, got, right in zip(("the loss", *self._gradients), alike, found, expected, strict=True):
            if not same:
                numbers = f"{name}: {got.item():.4g}, not {right.item():.4g}"
                raise CannotRecord(
                    f"a recorded training pass differs from the plain one ({numbers}): leave out --cuda_graph"
                )

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


def recordable(ranks: Ranks, *, dropout: float) -> bool:
    """One GPU, and nothing that draws random numbers: a replay and the pass that it is checked against would draw others."""
    return ranks.device != "cpu" and ranks.size == 1 and dropout == 0


def graph_passes(
    vla: VLA, ranks: Ranks, processor: Processor, instructions: Iterable[str], *, passes: int, autocast: bool
) -> GraphedPass | None:
    """What runs a run's passes where they can be recorded, which takes rows that all have as many labels; else None, said."""
    words = processor.longest_row(instructions)
    dropout = max((module.p for module in vla.modules() if isinstance(module, nn.Dropout)), default=0.0)
    lengths = {len(entry["action"]["q01"]) for entry in processor.statistics.values()}
    if not recordable(ranks, dropout=dropout) or len(lengths) > 1 or words >= MAX_LENGTH:
        tqdm.write("notice: --cuda_graph is for one GPU, no dropout and actions of one length: passes are not recorded")
        return None
    return GraphedPass(vla, words=words, passes=passes, autocast=autocast)
