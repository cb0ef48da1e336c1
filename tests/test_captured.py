"""Captured decoding without a GPU: what surrounds the graphs (padding, static tensors, fallback) with passes that are called, not replayed."""

import copy

import pytest
import torch

from prismatic.models import captured
from prismatic.models.captured import KEPT, CapturedDecoder, capture, compile_layers
from prismatic.models.decode import Decoder
from prismatic.models.onednn import OneDNNLinear
from prismatic.models.vla import VLA
from tests.test_decode import hostile_drafts, lively, prompts  # noqa: F401  (a fixture)


class Tape:
    """In place of a CUDA graph: warms up, returns one tensor that each replay fills anew, and counts recordings."""

    def __init__(self) -> None:
        self.recorded: list[str] = []

    def __call__(self, function):
        self.recorded.append(function.__name__)
        for _ in range(2):
            result = function()

        def play() -> torch.Tensor:
            return result.copy_(function())

        return play


@pytest.mark.parametrize("batch", [1, 3])
def test_padding_and_static_tensors_change_no_answer(lively: VLA, batch: int) -> None:  # noqa: F811
    plain, tape = Decoder(lively), Tape()
    captured = CapturedDecoder(lively, record=tape)
    first_answer = None
    for seed in range(2):  # the second time everything is replayed with new content
        ids, mask, pixels = prompts(batch, seed=seed)
        expected = plain(ids, pixels, 7, mask).ids
        answer = captured(ids, pixels, 7, mask).ids
        assert answer.equal(expected)
        for name, draft in hostile_drafts(expected).items():
            assert captured(ids, pixels, 7, mask, draft).ids.equal(expected), name
        first_answer = answer if first_answer is None else first_answer
    assert first_answer is not None and not first_answer.equal(expected)  # not overwritten by the later calls
    assert sorted(tape.recorded) == ["again", "first", "plain"]


def test_each_input_is_taken_anew(lively: VLA) -> None:  # noqa: F811
    plain, captured = Decoder(lively), CapturedDecoder(lively, record=Tape())
    ids, mask, pixels = prompts(4)
    other_ids, _, other_pixels = prompts(4, seed=1)
    full = torch.ones_like(mask)
    answers = []
    for inputs in (
        (ids, pixels, 7, full),
        (other_ids, pixels, 7, full),
        (ids, other_pixels, 7, full),
        (ids, pixels, 7, mask),
    ):
        answers.append(captured(*inputs).ids)
        assert answers[-1].equal(plain(*inputs).ids)
    assert len({tuple(answer.flatten().tolist()) for answer in answers}) == 4


def test_shapes_share_graphs_and_old_ones_are_dropped(lively: VLA) -> None:  # noqa: F811
    tape = Tape()
    captured = CapturedDecoder(lively, record=tape)
    ids, mask, pixels = prompts(4)
    captured(ids, pixels, 1, mask)
    captured(ids[:3], pixels[:3], 1, mask[:3])  # padded to four rows
    captured(ids[:, :9], pixels, 1, mask[:, :9])  # and to 32 words
    assert len(tape.recorded) == 1
    for dim in range(2, 2 + KEPT):
        captured(ids[:1], pixels[:1], dim, mask[:1])
    captured(ids, pixels, 1, mask)
    assert len(tape.recorded) == 1 + KEPT + 1


def test_what_cannot_be_recorded_is_decoded_pass_by_pass(lively: VLA) -> None:  # noqa: F811
    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    ids, mask, pixels = prompts(2)
    captured = CapturedDecoder(lively, record=refuse)
    expected = Decoder(lively)(ids, pixels, 7, mask).ids
    with pytest.warns(UserWarning, match="not captured"):
        assert captured(ids, pixels, 7, mask).ids.equal(expected)
    assert captured(ids, pixels, 7, mask, expected).ids.equal(expected)


def test_what_cannot_be_compiled_is_decoded_by_the_model_itself(lively: VLA) -> None:  # noqa: F811
    def refuse(graph, inputs):
        raise FileNotFoundError("no compiler")

    ids, mask, pixels = prompts(2)
    expected = Decoder(lively)(ids, pixels, 7, mask).ids
    torch._dynamo.reset()
    captured = CapturedDecoder(lively, compile_layers(lively, backend=refuse), record=Tape())
    with pytest.warns(UserWarning, match="(?s)not captured.*no compiler"):
        assert captured(ids, pixels, 7, mask).ids.equal(expected)
    assert captured(ids, pixels, 7, mask, expected).ids.equal(expected)


@pytest.mark.parametrize("usable", [True, False])
def test_on_a_cpu_nothing_is_recorded(lively: VLA, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(captured, "usable", lambda: usable)
    decoder = capture(copy.deepcopy(lively).train())
    assert type(decoder) is Decoder
    assert not any(part.training for part in decoder.vla.modules())  # dropout would draw
    assert any(isinstance(part, OneDNNLinear) for part in decoder.vla.modules()) is usable


def test_layers_compile_whole(lively: VLA) -> None:  # noqa: F811
    vla = copy.deepcopy(lively)
    ids, mask, pixels = prompts(2)
    draft = torch.zeros(2, 7, dtype=torch.int64)
    expected = Decoder(lively)(ids, pixels, 7, mask, draft).ids
    torch._dynamo.reset()
    # a graph break or one recompilation too many would raise
    compiled = compile_layers(vla, backend="eager", fullgraph=True)
    frames = torch._dynamo.utils.counters["frames"]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert vla.generate_action_ids(ids, pixels, 7, mask).equal(expected)
        assert frames["ok"] == 0  # the model itself is not compiled
        assert Decoder(compiled)(ids, pixels, 7, mask, draft).ids.equal(expected)
        assert compiled.generate_action_ids(ids, pixels, 7, mask).equal(expected)
    assert next(compiled.parameters()) is next(vla.parameters())
    assert frames["ok"] <= 12  # not one a layer, nor one a column
