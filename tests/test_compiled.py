"""Compiled decoding: the same tokens as eager, few shapes, one cache, and the eager way where compiling fails. Traced here, not run on a GPU."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from prismatic.machine import GPU_RENDERER_BYTES
from prismatic.models.compiled import (
    ACTIVATION_BYTES,
    BATCH_SIZES,
    NO_GRAPHS,
    PROMPT_WIDTH,
    VARIANTS,
    WIDEST,
    CompiledActionDecoder,
    batches,
    compile_step,
    decoder_for,
    memory_for,
    read_chunk,
)
from prismatic.models.decode import ActionDecoder
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import VLA, VLAConfig
from prismatic.ranges import ActionHead

traced = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)  # a graph break raises


@pytest.fixture(scope="module")
def vla() -> VLA:
    return lively(random_vla(TINY, seed=3))


def lively(vla: VLA) -> VLA:
    """Its answers depend on what is read."""
    for name, parameter in vla.language_model.model.layers.named_parameters():
        if "norm" not in name:
            parameter.data *= 4
    return vla.eval().requires_grad_(False)


def prompts(rows: int, tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(5, 700, (rows, tokens), generator=generator)
    mask = torch.arange(tokens) < torch.randint(5, tokens + 1, (rows, 1), generator=generator)
    return ids.masked_fill(~mask, TINY.pad_token_id), torch.randn(rows, 12, 128, 128, generator=generator), mask


def test_tokens_are_eagers_whatever_the_draft_and_nothing_breaks_the_graph(vla: VLA) -> None:
    torch._dynamo.reset()
    said: list[str] = []
    decode, eager = CompiledActionDecoder(vla, compiler=traced, say=said.append), ActionDecoder(vla)
    for rows in (3, 4, 1, 3):
        ids, pixels, mask = prompts(rows)
        expected = eager(ids, pixels, 7, mask)
        for draft in (None, expected.ids, expected.ids.flip(1)):
            answer = decode(ids, pixels, 7, mask, draft)
            assert answer.ids.equal(expected.ids) and answer.ids.shape == (rows, 7)
            torch.testing.assert_close(answer.margins, expected.margins, atol=1e-3, rtol=1e-3)
        assert answer.forward_passes <= 7
    assert decode.description == "compiled"
    # 3 and 4 rows are one shape: each step of each shape is announced, and timed, once
    assert [line.split()[0] for line in said] == ["compiling", "compiled"] * 4


def test_a_batch_is_cut_into_few_shapes_of_which_a_quarter_is_padding() -> None:
    cut = {rows: list(batches(rows)) for rows in range(1, 200)}
    assert {size for sizes in cut.values() for size in sizes} == {*BATCH_SIZES}
    assert all(rows <= sum(sizes) <= rows * 4 / 3 for rows, sizes in cut.items())
    assert cut[3] == [4] and cut[5] == [4, 1] and cut[7] == [4, 4] and cut[12] == [16] and cut[70] == [64, 4, 1, 1]


def test_rows_of_a_batch_that_is_cut_are_answered_as_alone(vla: VLA) -> None:
    decode = CompiledActionDecoder(vla, compiler=lambda step: step, say=lambda line: None)
    ids, pixels, mask = prompts(6)
    expected = ActionDecoder(vla)(ids, pixels, 7, mask)
    for draft in (None, expected.ids, expected.ids.flip(0)):
        answer = decode(ids, pixels, 7, mask, draft)
        assert answer.ids.equal(expected.ids) and answer.margins.shape == (6, 7)


@pytest.mark.parametrize("head", ["l1", "parallel"])
def test_chunks_are_eagers_row_by_row_and_nothing_breaks_the_graph(head: ActionHead) -> None:
    torch._dynamo.reset()
    state = 8 if head == "l1" else 0
    config = dataclasses.replace(TINY, action_head=head, num_actions_chunk=3, proprio_dim=state)
    chunked, said = lively(random_vla(config, seed=3)), []
    decode, eager = CompiledActionDecoder(chunked, compiler=traced, say=said.append), ActionDecoder(chunked)
    for rows in (5, 1, 3):
        ids, pixels, mask = prompts(rows)
        ids[0, int(mask[0].sum()) - 1] = TINY.empty_token_id  # one row has it already
        proprio = torch.randn(rows, state, generator=torch.Generator().manual_seed(0)) if state else None
        answer, margins, passes = decode.chunk(ids, pixels, proprio, mask)
        expected, expected_margins, _ = eager.chunk(ids, pixels, proprio, mask)
        assert answer.shape == (rows, 3, 7) and answer.dtype == expected.dtype
        assert passes == len(list(batches(rows))) and len(expected.unique()) > 3
        torch.testing.assert_close(answer, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(margins, expected_margins, atol=1e-3, rtol=1e-3)
    assert decode.description == "compiled"
    assert [line.split()[0] for line in said] == ["compiling", "compiled"] * 2  # of 4 rows and of one
    wide = prompts(2, WIDEST + 1)
    proprio = torch.zeros(2, state) if state else None
    assert decode.chunk(*wide[:2], proprio)[0].equal(eager.chunk(*wide[:2], proprio)[0])
    assert f"{WIDEST} tokens" in decode.description


@pytest.mark.parametrize("action_dim", [7, 14])
def test_more_rows_or_the_second_width_compile_nothing_anew(vla: VLA, action_dim: int) -> None:
    """Compiled code is of certain strides; which allocation they are in is no matter to it."""
    decode = CompiledActionDecoder(vla, compiler=lambda step: step, say=lambda line: None)
    strides = {}
    for rows, tokens in ((1, 12), (4, 12), (1, PROMPT_WIDTH + 1), (4, 12), (1, 12), (16, WIDEST)):
        decode(*prompts(rows, tokens)[:2], action_dim, None)
        for shape, layers in decode._views.items():
            assert strides.setdefault(shape, layers[0][0].stride()) == layers[0][0].stride()
    cache = sum(part.nbytes for layer in decode._cache for part in layer)
    if action_dim == vla.config.action_dim:
        assert [memory_for(vla, rows) - rows * ACTIVATION_BYTES for rows in (12, 16)] == [cache, cache]


def test_a_prompt_beyond_the_second_width_is_decoded_eagerly_which_is_said_once(vla: VLA) -> None:
    said: list[str] = []
    decode = CompiledActionDecoder(vla, compiler=failing(AssertionError("not to be compiled")), say=said.append)
    ids, pixels, _ = prompts(3, WIDEST + 1)
    for _ in range(2):
        assert decode(ids, pixels, 7).ids.equal(ActionDecoder(vla)(ids, pixels, 7).ids)
    assert (
        not decode._cache
        and len(said) == 1
        and f"{WIDEST} tokens" in said[0]
        and f"{WIDEST} tokens" in decode.description
    )


def test_of_a_batch_with_one_wide_prompt_each_row_is_answered_as_alone(
    vla: VLA, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches, grow = [], ActionDecoder._grow
    monkeypatch.setattr(ActionDecoder, "_grow", lambda self, *size: caches.append(size) or grow(self, *size))
    ids, pixels, _ = prompts(3, WIDEST + 9)
    mask = torch.arange(WIDEST + 9) < torch.tensor([[12], [WIDEST + 9], [PROMPT_WIDTH + 5]])
    ids = ids.masked_fill(~mask, TINY.pad_token_id)
    expected = ActionDecoder(vla)(ids, pixels, 7, mask)
    caches.clear()
    decode = CompiledActionDecoder(vla, compiler=lambda step: step, say=lambda line: None)
    answer = decode(ids, pixels, 7, mask, expected.ids)
    assert answer.ids.equal(expected.ids) and answer.margins.allclose(expected.margins, atol=1e-5)
    # two rows of usual width together, beside whose cache only a wide row's is held
    assert answer.forward_passes == 2 + 2 + 2 and decode.description.startswith(
        "compiled; eager for prompts of more than"
    )
    assert [rows for rows, _ in caches] == [1, 1]


def test_what_torch_does_not_record_as_a_graph_is_said_once(vla: VLA) -> None:
    said: list[str] = []

    def compiler(step: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] += 1
            return step(*arguments)

        return run

    decode = CompiledActionDecoder(vla, compiler=compiler, say=said.append)
    for _ in range(2):
        decode(*prompts(1)[:2], 7)
    assert decode.description == f"compiled {NO_GRAPHS}"
    assert [line for line in said if "notice" in line] == [
        f"notice: a batch of 1 is decoded {NO_GRAPHS}: slower than it could be"
    ]


def test_an_a10_holds_openvla_7b_and_twelve_simulators() -> None:
    """By arithmetic, on allowances that were not measured; for 16 they come to 23.4 GiB."""
    with torch.device("meta"):
        vla = VLA(VLAConfig()).to(torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in vla.parameters())
    needs = {n: weights + memory_for(vla, n) + n * GPU_RENDERER_BYTES for n in (12, 16)}
    assert needs[12] < 22.2 * 2**30 < needs[16]


def failing(error: Exception) -> Callable[[Any], Callable[..., Any]]:
    """A compiler for one row alone."""

    def compiler(step: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if len(arguments[2]) > 1:
                raise error
            return step(*arguments)

        return run

    return compiler


@pytest.mark.parametrize("error", [RuntimeError("no compiler\nat all"), torch.OutOfMemoryError("no compiler")])
def test_a_batch_that_cannot_be_compiled_runs_eagerly_and_says_so_once(vla: VLA, error: Exception) -> None:
    said: list[str] = []
    decode = CompiledActionDecoder(vla, compiler=failing(error), say=said.append)
    for rows, description in ((3, ""), (1, "compiled; "), (3, "compiled; ")):
        ids, pixels, mask = prompts(rows)
        assert decode(ids, pixels, 7, mask).ids.equal(ActionDecoder(vla)(ids, pixels, 7, mask).ids)
        assert decode.description == f"{description}eager for a batch of 4: no compiler"
    notices = [line for line in said if "notice" in line]
    assert notices == ["notice: a batch of 4 can't be compiled and is decoded eagerly: no compiler"]


def test_chunks_whose_batch_cannot_be_compiled_are_answered_as_eager_does_unpadded(vla: VLA) -> None:
    chunked, widths = random_vla(dataclasses.replace(TINY, action_head="parallel", num_actions_chunk=3), seed=3), []
    decode = CompiledActionDecoder(chunked, compiler=failing(RuntimeError("no compiler")), say=lambda line: None)
    chunked.vision_backbone.register_forward_hook(lambda *call: widths.append(len(call[2])))
    ids, pixels, mask = prompts(5)
    for _ in range(2):
        assert decode.chunk(ids, pixels, None, mask)[0].equal(ActionDecoder(chunked).chunk(ids, pixels, None, mask)[0])
    assert widths == [4, 1, 5, 5, 5] and decode.description.endswith("eager for a batch of 4: no compiler")


def test_an_input_that_plain_decoding_refuses_is_no_fault_of_the_compiler(vla: VLA) -> None:
    decode = CompiledActionDecoder(vla, compiler=failing(RuntimeError("broken")), say=lambda line: None)
    ids, pixels, mask = prompts(3)
    with pytest.raises(RuntimeError):
        decode(ids, pixels[..., :64], 7, mask)
    assert decode.description == "compiled"


def test_on_a_cpu_nothing_is_compiled(vla: VLA) -> None:
    assert type(decoder_for(vla)) is ActionDecoder and decoder_for(vla).description == "eager"


def test_a_torch_that_knows_no_limit_of_its_own_gets_it_by_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """2.11's torch.compile has no such option; a fallback to eager would hide it."""
    given: dict[str, Any] = {}

    def compile_of_2_11(step: Any, *, fullgraph: bool, dynamic: bool, mode: str) -> Any:
        given.update(fullgraph=fullgraph, dynamic=dynamic, mode=mode)
        return step

    with torch._dynamo.config.patch(recompile_limit=8):
        monkeypatch.setattr(torch, "compile", compile_of_2_11)
        assert compile_step(read_chunk) is read_chunk
        assert given == {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"}
        assert torch._dynamo.config.recompile_limit == VARIANTS
