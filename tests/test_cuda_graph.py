"""Recorded training passes without a GPU: what surrounds the graph, with passes that are called in place of replayed; and, on fake tensors, that
nothing in a pass waits for the device or sends it something, which a graph could not hold.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import finetune
from action_tokenizer import ActionTokenizer
from config import FinetuneConfig
from prismatic.models.checkpointing import checkpoint_activations
from prismatic.models.graphs import Recorder
from prismatic.models.lora import add_lora
from prismatic.models.tiny import TINY, random_vla, tiny_tokenizer
from prismatic.models.vla import IGNORE, VLA
from prismatic.processor import Batch, Processor, ProcessorConfig
from prismatic.training import cuda_graph
from prismatic.training.activations import LABELS, Precision, fake_vla, shallow
from prismatic.training.cuda_graph import Answer, CannotRecord, GraphedPass, graph_passes, padded
from prismatic.training.distributed import ALONE, Ranks
from prismatic.training.step import backward, one_pass
from tests.drawn_run import cfg, place, rows, run_folder  # noqa: F401  (fixtures)

WORDS, PASSES = 24, 2
TOKENIZER = ActionTokenizer(TINY.vocab_size)


def row_batch(seed: int, *, rows: int = 2, labels: int = LABELS) -> Batch:
    """Random rows of different length, the last `labels` ids of each to be learnt."""
    draw = torch.Generator().manual_seed(seed)
    width = WORDS - seed % 3
    ids = torch.full((rows, width), TINY.pad_token_id)
    targets = torch.full((rows, width), IGNORE)
    for row in range(rows):
        end = width - row
        ids[row, :end] = torch.randint(4, TOKENIZER.first_id, (end,), generator=draw)
        actions = torch.randint(TOKENIZER.first_id, TINY.vocab_size, (labels - 1,), generator=draw)
        ids[row, end - labels : end] = torch.tensor([*actions, 2])
        targets[row, end - labels : end] = ids[row, end - labels : end]
    side = TINY.image_size
    pixels = torch.randn(rows, 6 * TINY.num_images_in_input, side, side, generator=draw)
    return Batch(ids, targets, ids != TINY.pad_token_id, pixels)


class CallingRecorder(Recorder):
    """In place of CUDA graphs: like one, a recording computes nothing when it is made, and its answer is two tensors that each replay fills anew."""

    def __init__(self) -> None:
        pass

    def run(self, work):
        return work()

    def record(self, work):
        kept: list[torch.Tensor] = []

        def play() -> Answer:
            new = work()
            if not kept:
                kept.extend(tensor.clone() for tensor in new)
            loss, logits = (fixed.copy_(tensor) for fixed, tensor in zip(kept, new, strict=True))
            return loss, logits

        return play


class Changed(CallingRecorder):
    """A recording that is right but for what `change` does to its loss and to the gradients of vla."""

    def __init__(self, vla: VLA, change: Callable[[torch.Tensor, dict[str, torch.Tensor]], None]) -> None:
        self.vla, self.change = vla, change

    def record(self, work):
        def play() -> Answer:
            loss, logits = work()
            self.change(loss, {name: p.grad for name, p in self.vla.named_parameters() if p.grad is not None})
            return loss, logits

        return play


def smallest(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient with the smallest norm that there is: hidden in a sum over all."""
    return min((g for g in gradients.values() if g.any()), key=lambda g: g.norm().item())


WRONG = {
    "double": lambda loss, gradients: [g.mul_(2) for g in gradients.values()],
    "one is 2 % off": lambda loss, gradients: smallest(gradients).mul_(1.02),
    "one is lost": lambda loss, gradients: smallest(gradients).zero_(),
    "one isn't finite": lambda loss, gradients: smallest(gradients).fill_(float("nan")),
    "the loss": lambda loss, gradients: loss.mul_(1.02),
}


class Stale(CallingRecorder):
    """A recording that plays what it has once computed: a graph into which the first batch was copied instead of its place."""

    def __init__(self, vla: VLA) -> None:
        self.vla = vla

    def record(self, work):
        gradients = [p.grad for p in self.vla.parameters() if p.grad is not None]
        before = [g.clone() for g in gradients]
        loss, logits = work()
        added = [g - old for g, old in zip(gradients, before, strict=True)]
        for gradient, old in zip(gradients, before, strict=True):
            gradient.copy_(old)

        def play() -> Answer:
            for gradient, more in zip(gradients, added, strict=True):
                gradient.add_(more)
            return loss, logits

        return play


class Refusing(CallingRecorder):
    """As torch does: what ends the recording raises too, and hides the reason."""

    def record(self, work):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore than there is")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture(scope="module")
def adapted() -> VLA:
    vla = add_lora(random_vla(TINY, seed=0), rank=4)
    for name, parameter in vla.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    return vla.train()


def learn(vla: VLA, graphed: GraphedPass | None, *, steps: int = 5) -> tuple[list[tuple[float, ...]], VLA]:
    """Losses, accuracies and L1 of steps of two passes, and the model that has learnt."""
    optimizer = torch.optim.AdamW([p for p in vla.parameters() if p.requires_grad], lr=1e-3)
    seen = []
    for step in range(steps):
        passes = [row_batch(PASSES * step + number) for number in range(PASSES)]
        metrics = backward(vla, passes, TOKENIZER, autocast=False, graphed=graphed)
        seen.append((metrics.loss, metrics.action_accuracy, metrics.l1_loss))
        optimizer.step()
        optimizer.zero_grad(set_to_none=graphed is None)
    return seen, vla


def graphed_pass(vla: VLA, recorder: Recorder) -> GraphedPass:
    return GraphedPass(vla, words=WORDS, passes=PASSES, autocast=False, recorder=recorder)


def assert_learnt_alike(one: VLA, other: VLA) -> None:
    for (name, expected), (_, found) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_replayed_passes_learn_the_same(adapted: VLA, checkpointing: bool) -> None:
    expected, plain = learn(copy.deepcopy(adapted), None)
    vla = copy.deepcopy(adapted)
    graphed = graphed_pass(checkpoint_activations(vla) if checkpointing else vla, CallingRecorder())
    found, vla = learn(vla, graphed)
    assert graphed.is_recorded
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert_learnt_alike(plain, vla)


def test_the_first_step_is_not_recorded(adapted: VLA) -> None:
    vla = copy.deepcopy(adapted)
    graphed = graphed_pass(vla, CallingRecorder())
    for number in range(PASSES):
        graphed(row_batch(number))
        assert not graphed.is_recorded
    vla.zero_grad(set_to_none=False)
    graphed(row_batch(PASSES))
    assert graphed.is_recorded


def test_gradients_stay_where_they_are_and_what_has_none_keeps_none(adapted: VLA) -> None:
    vla = copy.deepcopy(adapted)
    graphed = graphed_pass(vla, CallingRecorder())
    unread = set(vla.unread_parameters())
    places = {name: p.grad.data_ptr() for name, p in vla.named_parameters() if p.grad is not None}
    assert set(places) == {name for name, p in vla.named_parameters() if p.requires_grad and name not in unread}
    assert any(".lora_" in name for name in unread)
    learn(vla, graphed)
    assert {name: p.grad.data_ptr() for name, p in vla.named_parameters() if p.grad is not None} == places
    vla.zero_grad()  # a graph would go on adding to tensors that nobody sees
    with pytest.raises(RuntimeError, match="gradients were taken away"):
        graphed(row_batch(0))


@pytest.mark.parametrize("name", WRONG)
def test_a_recording_that_is_wrong_anywhere_is_refused(adapted: VLA, name: str) -> None:
    vla = copy.deepcopy(adapted)
    with pytest.raises(
        CannotRecord, match=r"differs from the plain one \((the loss|.*lora_.*): .* leave out --cuda_graph"
    ):
        learn(vla, graphed_pass(vla, Changed(vla, WRONG[name])))


def test_a_recording_that_never_reads_its_input_is_refused(adapted: VLA) -> None:
    vla = copy.deepcopy(adapted)
    with pytest.raises(CannotRecord, match="differs from the plain one"):
        learn(vla, graphed_pass(vla, Stale(vla)))


def test_what_cannot_be_recorded_ends_in_a_sentence_with_the_first_reason(adapted: VLA) -> None:
    vla = copy.deepcopy(adapted)
    with pytest.raises(
        CannotRecord, match=r"can't be recorded \(CUDA out of memory. Tried to allocate\): leave out"
    ) as refused:
        learn(vla, graphed_pass(vla, Refusing()))
    assert isinstance(refused.value.__cause__, torch.OutOfMemoryError)


def test_where_nothing_is_finite_nothing_is_refused(adapted: VLA) -> None:
    vla = copy.deepcopy(adapted)
    vla.get_parameter("language_model.lm_head.base_layer.weight").data.fill_(float("nan"))
    graphed = graphed_pass(vla, CallingRecorder())
    learn(vla, graphed, steps=2)
    assert graphed.is_recorded


@pytest.mark.parametrize("odd", ["longer", "one label less in a row"])
def test_a_batch_that_no_graph_holds_is_an_error(odd: str) -> None:
    batch = row_batch(3)
    if odd == "longer":
        batch.input_ids, batch.labels = (nn.functional.pad(ids, (0, 5)) for ids in (batch.input_ids, batch.labels))
    else:
        batch.labels[0, -1] = IGNORE
    with pytest.raises(ValueError, match="don't fit"):
        padded(batch, WORDS, TINY.pad_token_id)


def test_only_on_one_gpu_without_dropout_for_actions_of_one_length(
    adapted: VLA, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "Recorder", CallingRecorder)
    dropping = add_lora(random_vla(TINY, seed=0), rank=4, dropout=0.1)
    words = ["put it on the plate"]
    one, other = ({"action": {"q01": [0.0] * length}} for length in (7, 8))
    config = ProcessorConfig.for_model(TINY, unnorm_key="a", center_crop=True)
    same, differing = (Processor(config, tiny_tokenizer(words), {"a": one, "b": b}) for b in (one, other))
    gpu = Ranks(device="cuda")
    for vla, ranks, processor in (
        (adapted, ALONE, same),
        (adapted, Ranks(0, 2, "cuda:0"), same),
        (dropping, gpu, same),
        (adapted, gpu, differing),
    ):
        assert graph_passes(vla, ranks, processor, words, passes=1, autocast=False) is None
        assert "--cuda_graph is for one GPU, no dropout" in capsys.readouterr().out
    graphed = graph_passes(copy.deepcopy(adapted), gpu, same, words, passes=1, autocast=False)
    assert graphed is not None and graphed.words == len(same.prompt_ids(words[0])) + 8


def test_finetune_learns_the_same_with_it(cfg: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    finetune.main(cfg)
    used: list[GraphedPass] = []

    def on_a_cpu(vla: VLA, ranks: Ranks, processor: Processor, instructions: list[str], **more: Any) -> GraphedPass:
        words = processor.longest_row(instructions)
        used.append(GraphedPass(vla, words=words, recorder=CallingRecorder(), **more))
        return used[0]

    monkeypatch.setattr(finetune, "graph_passes", on_a_cpu)
    again = dataclasses.replace(cfg, run_root_dir=cfg.run_root_dir / "graphed", cuda_graph=True)
    finetune.main(again)
    assert used[0].is_recorded
    expected, found = (load_file(run_folder(c) / "latest" / "adapter_model.safetensors") for c in (cfg, again))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-3, msg=name)
    losses = [[row["loss"] for row in rows(run_folder(c))] for c in (cfg, again)]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), atol=1e-5, rtol=1e-5)


HOST = ("cpu", "cuda", "item", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__")


class Waiting(TorchFunctionMode):
    """Raises where the host would read a tensor's numbers, or move it to another device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert getattr(func, "__name__", "") not in HOST, func
        places = (torch.device, str)
        moves = "device" in kwargs or any(isinstance(value, places) for value in args[1:])
        assert func is not torch.Tensor.to or not moves, f"to {args[1:]} {kwargs}"
        return func(*args, **kwargs)


class Sent(TorchDispatchMode):
    """Raises where a tensor is made of Python's numbers: on a GPU that is a copy from the host, which a graph would repeat for ever."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "lift_fresh" not in str(func), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "precision", [Precision(lora_rank=4), Precision(lora_rank=0, base_dtype=torch.float32, autocast=True)]
)
def test_a_pass_never_waits_for_the_device(precision: Precision, checkpointing: bool) -> None:
    mode = FakeTensorMode()
    vla = fake_vla(shallow(TINY), precision, mode)
    if checkpointing:
        checkpoint_activations(vla)
    inputs = padded(row_batch(0), WORDS, TINY.pad_token_id)
    assert inputs is not None
    batch, columns = (
        Batch(*(mode.from_tensor(t) for t in inputs.tensors()[:-1])),
        mode.from_tensor(inputs.label_columns),
    )
    with mode, Sent(), Waiting():
        one_pass(vla, batch, passes=PASSES, autocast=precision.autocast, label_columns=columns)
    assert sum(p.grad is not None for p in vla.parameters()) > 20
    with mode, pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        one_pass(vla, batch, passes=PASSES, autocast=precision.autocast)  # looks for the labels
