"""Recorded training passes without a GPU: what surrounds the graph, with passes that are called in place of replayed; and, on fake tensors, that
nothing in a pass waits for the device or sends it something, which a graph could not hold.
"""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from action_tokenizer import ActionTokenizer
from prismatic.models.checkpointing import checkpoint_activations
from prismatic.models.lora import add_lora
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import IGNORE, VLA
from prismatic.processor import Batch
from prismatic.training import recorded as module
from prismatic.training.activations import LABELS, Precision, fake_vla, shallow
from prismatic.training.distributed import ALONE, Ranks
from prismatic.training.recorded import Answer, Pass, RecordedPass, Recorder, padded, record_passes
from prismatic.training.step import backward, one_pass

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

    def run(self, work: Pass) -> Answer:
        return work()

    def record(self, work: Pass) -> Pass:
        kept: list[torch.Tensor] = []

        def play() -> Answer:
            new = work()
            if not kept:
                kept.extend(tensor.clone() for tensor in new)
            loss, logits = (fixed.copy_(tensor) for fixed, tensor in zip(kept, new, strict=True))
            return loss, logits

        return play


@pytest.fixture(scope="module")
def adapted() -> VLA:
    vla = add_lora(random_vla(TINY, seed=0), rank=4)
    for name, parameter in vla.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    return vla.train()


def learn(vla: VLA, recorded: RecordedPass | None, *, steps: int = 5) -> tuple[list[tuple[float, ...]], VLA]:
    """Losses, accuracies and L1 of steps of two passes, and the model that has learnt."""
    optimizer = torch.optim.AdamW([p for p in vla.parameters() if p.requires_grad], lr=1e-3)
    seen = []
    for step in range(steps):
        passes = [row_batch(PASSES * step + number) for number in range(PASSES)]
        metrics = backward(vla, passes, TOKENIZER, autocast=False, recorded=recorded)
        seen.append((metrics.loss, metrics.action_accuracy, metrics.l1_loss))
        optimizer.step()
        optimizer.zero_grad(set_to_none=recorded is None)
    return seen, vla


def recording(vla: VLA, recorder: Recorder) -> RecordedPass:
    return RecordedPass(vla, words=WORDS, passes=PASSES, autocast=False, recorder=recorder)


def assert_learnt_alike(one: VLA, other: VLA) -> None:
    for (name, expected), (_, found) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_replayed_passes_learn_the_same(adapted: VLA, checkpointing: bool) -> None:
    expected, plain = learn(copy.deepcopy(adapted), None)
    vla = copy.deepcopy(adapted)
    replaying = recording(checkpoint_activations(vla) if checkpointing else vla, CallingRecorder())
    found, vla = learn(vla, replaying)
    assert replaying.is_recorded and not replaying.given_up
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert_learnt_alike(plain, vla)


def test_the_first_step_is_plain_and_recording_computes_nothing(adapted: VLA) -> None:
    vla = copy.deepcopy(adapted)
    replaying = recording(vla, CallingRecorder())
    for number in range(PASSES):
        replaying(row_batch(number))
        assert not replaying.is_recorded
    vla.zero_grad(set_to_none=False)
    replaying(row_batch(PASSES))
    assert replaying.is_recorded


def test_gradients_stay_where_they_are_and_what_has_none_keeps_none(adapted: VLA) -> None:
    vla = copy.deepcopy(adapted)
    replaying = recording(vla, CallingRecorder())
    unread = set(vla.unread_parameters())
    places = {name: p.grad.data_ptr() for name, p in vla.named_parameters() if p.grad is not None}
    assert set(places) == {name for name, p in vla.named_parameters() if p.requires_grad and name not in unread}
    assert any(".lora_" in name for name in unread)
    learn(vla, replaying)
    assert {name: p.grad.data_ptr() for name, p in vla.named_parameters() if p.grad is not None} == places


class Stale(CallingRecorder):
    """Its recording never reads another batch than the first: what a graph is whose input was copied while it was recorded."""

    def __init__(self, vla: VLA) -> None:
        self.vla = vla

    def record(self, work: Pass) -> Pass:
        inputs = padded(row_batch(0), WORDS, TINY.pad_token_id)
        assert inputs is not None
        columns = inputs.label_columns
        return lambda: one_pass(self.vla, inputs.batch, passes=PASSES, autocast=False, label_columns=columns)


class Double(CallingRecorder):
    """The loss is right, the gradients are twice what they should be."""

    def record(self, work: Pass) -> Pass:
        def play() -> Answer:
            work()
            return work()

        return play


class Refusing(CallingRecorder):
    def record(self, work: Pass) -> Pass:
        work()  # gradients are there when it breaks off
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("recorder", "why"),
    [(Stale, "differs from the plain one"), (Double, "differs from the plain one by 100"), (Refusing, "not permitted")],
)
def test_a_recording_that_is_wrong_or_fails_is_given_up(adapted: VLA, recorder: type[Recorder], why: str) -> None:
    expected, plain = learn(copy.deepcopy(adapted), None)
    vla = copy.deepcopy(adapted)
    replaying = recording(vla, Stale(vla) if recorder is Stale else recorder())
    with pytest.warns(UserWarning, match=f"not recorded.*{why}"):
        found, vla = learn(vla, replaying)
    assert not replaying.is_recorded and why in replaying.given_up
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert_learnt_alike(plain, vla)


def test_a_batch_that_does_not_fit_the_graph_is_run_plainly(adapted: VLA) -> None:
    vla = copy.deepcopy(adapted)
    replaying = recording(vla, CallingRecorder())
    learn(vla, replaying, steps=2)
    odd = {"fewer rows": row_batch(1, rows=1), "fewer labels": row_batch(1, labels=5), "cut": row_batch(1)}
    odd["cut"].labels[0, -1] = odd["cut"].input_ids[0, 0]  # one label more than the other row
    odd["longer"] = copy.deepcopy(row_batch(3))
    odd["longer"].input_ids = nn.functional.pad(odd["longer"].input_ids, (0, 5), value=TINY.pad_token_id)
    odd["longer"].labels = nn.functional.pad(odd["longer"].labels, (0, 5), value=IGNORE)
    for name, batch in odd.items():
        expected, _ = one_pass(copy.deepcopy(vla), batch, passes=PASSES, autocast=False)
        torch.testing.assert_close(replaying(batch)[0], expected, msg=name)
    assert replaying.is_recorded


def test_only_on_one_gpu_without_dropout(
    adapted: VLA, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Recorder", CallingRecorder)
    dropping = add_lora(random_vla(TINY, seed=0), rank=4, dropout=0.1)
    sizes = {"words": WORDS, "passes": 1, "autocast": False}
    for vla, ranks in ((adapted, ALONE), (adapted, Ranks(0, 2, "cuda:0")), (dropping, Ranks(device="cuda"))):
        assert record_passes(vla, ranks, **sizes) is None
        assert "--cuda_graph is for one GPU and no dropout" in capsys.readouterr().out
    assert record_passes(copy.deepcopy(adapted), Ranks(device="cuda"), **sizes) is not None


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
    with mode, Sent():
        one_pass(vla, batch, passes=PASSES, autocast=precision.autocast, label_columns=columns)
    assert sum(p.grad is not None for p in vla.parameters()) > 20
    with mode, pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        one_pass(vla, batch, passes=PASSES, autocast=precision.autocast)  # looks for the labels
