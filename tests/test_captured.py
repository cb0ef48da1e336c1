"""Captured decoding without a GPU: what surrounds the graphs (padding, static tensors, fallback) with passes that are called, not replayed."""

import copy

import pytest
import torch

from prismatic.models import captured
from prismatic.models.captured import KEPT, CapturedDecoder, capture, compile_layers
from prismatic.models.decode import Decoder
from prismatic.models.graphs import Recorder
from prismatic.models.onednn import OneDNNLinear
from prismatic.models.vla import VLA
from tests.test_decode import hostile_drafts, lively, prompts  # noqa: F401  (a fixture)


class Tape(Recorder):
    """In place of CUDA graphs: returns one tensor that each replay fills anew, and counts recordings."""

    def __init__(self) -> None:
        self.recorded: list[str] = []

    def run(self, work):
        return work()

    def record(self, work):
        self.recorded.append(work.__name__)
        result = work()

        def play() -> torch.Tensor:
            return result.copy_(work())

        return play


@pytest.mark.parametrize("batch", [1, 3])
def test_padding_and_static_tensors_change_no_answer(lively: VLA, batch: int) -> None:  # noqa: F811
    plain, tape = Decoder(lively), Tape()
    captured = CapturedDecoder(lively, recorder=tape)
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
    plain, captured = Decoder(lively), CapturedDecoder(lively, recorder=Tape())
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
    captured = CapturedDecoder(lively, recorder=tape)
    ids, mask, pixels = prompts(4)
    captured(ids, pixels, 1, mask)
    captured(ids[:3], pixels[:3], 1, mask[:3])  # padded to four rows
    captured(ids[:, :9], pixels, 1, mask[:, :9])  # and to 32 words
    assert len(tape.recorded) == 1
    for dim in range(2, 2 + KEPT):
        captured(ids[:1], pixels[:1], dim, mask[:1])
    captured(ids, pixels, 1, mask)
    assert len(tape.recorded) == 1 + KEPT + 1


class Refusing(Tape):
    def record(self, work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


class Empty(Tape):
    """What is recorded where the current GPU is another than the tensors': nothing, and each replay returns what was there."""

    def record(self, work):
        result = work()
        return lambda: result


class Deaf(Tape):
    """A recording that reads a copy of the pictures."""

    def record(self, work):
        decoding = work.__self__
        pictures = decoding.pixel_values.clone()

        def play():
            now, decoding.pixel_values = decoding.pixel_values, pictures
            result = work()
            decoding.pixel_values = now
            return result

        return play


@pytest.mark.parametrize("recorder", [Refusing, Empty, Deaf])
def test_what_cannot_be_recorded_or_is_wrong_is_decoded_pass_by_pass(lively: VLA, recorder: type[Tape]) -> None:  # noqa: F811
    ids, mask, pixels = prompts(2)
    captured = CapturedDecoder(lively, recorder=recorder())
    expected = Decoder(lively)(ids, pixels, 7, mask).ids
    why = (
        "not permitted when stream is capturing$" if recorder is Refusing else "answers otherwise than the pass itself"
    )
    with pytest.warns(UserWarning, match=f"not captured, each pass is started by itself: .*{why}"):
        assert captured(ids, pixels, 7, mask).ids.equal(expected)
    assert captured(ids, pixels, 7, mask, expected).ids.equal(expected)
    assert len(captured.given_up) == 1 and not captured.models


def test_what_cannot_be_compiled_is_recorded_as_it_is(lively: VLA) -> None:  # noqa: F811
    def refuse(graph, inputs):
        raise FileNotFoundError("no compiler")

    ids, mask, pixels = prompts(2)
    expected = Decoder(lively)(ids, pixels, 7, mask).ids
    torch._dynamo.reset()
    tape = Tape()
    captured = CapturedDecoder(lively, compile_layers(lively, backend=refuse), recorder=tape)
    with pytest.warns(UserWarning, match="not compiled: .*no compiler"):
        assert captured(ids, pixels, 7, mask).ids.equal(expected)
    assert captured(ids, pixels, 7, mask, expected).ids.equal(expected)
    assert sorted(tape.recorded) == ["first", "plain"]


class Small(Tape):
    """A GPU on which so many recordings find room."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def record(self, work):
        if len(self.recorded) >= self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().record(work)


def test_where_memory_is_short_older_shapes_go_once_and_then_what_does_not_fit_is_not_recorded(lively: VLA) -> None:  # noqa: F811
    ids, mask, pixels = prompts(4)
    expected = Decoder(lively)(ids, pixels, 7, mask).ids
    captured = CapturedDecoder(lively, recorder=Small(2))

    def answers(rows: int) -> bool:
        return captured(ids[:rows], pixels[:rows], 7, mask[:rows]).ids.equal(expected[:rows])

    assert answers(1) and answers(2) and len(captured._shapes) == 2
    with pytest.warns(UserWarning, match="not captured for a batch of 4: CUDA out of memory"):
        assert answers(4)  # the others went first, in vain
    assert answers(4) and not captured._shapes and len(captured.given_up) == 1
    captured._recorder.room = 3  # type: ignore[union-attr]
    assert answers(1) and len(captured._shapes) == 1


def test_two_shapes_do_not_drive_each_other_out(lively: VLA) -> None:  # noqa: F811
    class Crowded(Tape):
        def record(self, work):
            if len(captured._shapes) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().record(work)

    ids, mask, pixels = prompts(2)
    tape = Crowded()
    captured = CapturedDecoder(lively, recorder=tape)
    captured(ids[:1], pixels[:1], 7, mask[:1])
    captured(ids, pixels, 7, mask)  # the first goes
    with pytest.warns(UserWarning, match="not captured for a batch of 1"):
        captured(ids[:1], pixels[:1], 7, mask[:1])
    for rows in (2, 1, 2, 1):
        captured(ids[:rows], pixels[:rows], 7, mask[:rows])
    assert tape.recorded == ["plain", "plain"]


def test_an_error_of_plain_decoding_is_raised_and_no_recordings_fault(
    lively: VLA,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids, mask, pixels = prompts(2)
    tape = Tape()
    captured = CapturedDecoder(lively, recorder=tape)
    with pytest.warns(UserWarning, match="not captured"), pytest.raises(RuntimeError, match="is invalid for input"):
        captured(ids, pixels[:, :-1], 7, mask)
    assert not captured.given_up
    captured(ids, pixels, 7, mask)
    assert tape.recorded[-1] == "plain"

    def too_early(*inputs):
        raise torch.OutOfMemoryError("before any pass")

    monkeypatch.setattr(captured, "_passes", too_early)
    with pytest.raises(torch.OutOfMemoryError, match="before any pass"):
        captured(ids, pixels, 7, mask)


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
