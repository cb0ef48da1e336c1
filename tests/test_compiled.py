"""Compiled decoding: the same tokens as eager, few shapes, one cache, and the eager way where compiling fails. Traced here, not run on a GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from prismatic.models.compiled import BATCH_SIZES, PROMPT_WIDTH, CompiledActionDecoder, decoder_for, padded_shape
from prismatic.models.decode import ActionDecoder
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import VLA, VLAConfig

traced = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)  # a graph break raises


@pytest.fixture(scope="module")
def vla() -> VLA:
    vla = random_vla(TINY, seed=3).eval().requires_grad_(False)
    for name, parameter in vla.language_model.model.layers.named_parameters():
        if "norm" not in name:
            parameter.data *= 4  # answers depend on what is read
    return vla


def prompts(rows: int, tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(5, 700, (rows, tokens), generator=generator)
    mask = torch.arange(tokens) < torch.randint(5, tokens + 1, (rows, 1), generator=generator)
    return ids.masked_fill(~mask, TINY.pad_token_id), torch.randn(rows, 12, 128, 128, generator=generator), mask


def test_tokens_are_eagers_whatever_the_draft_and_nothing_breaks_the_graph(vla: VLA) -> None:
    torch._dynamo.reset()
    said: list[str] = []
    decode, eager = CompiledActionDecoder(vla, compiler=traced, say=said.append), ActionDecoder(vla)
    for rows in (3, 2, 1, 3):
        ids, pixels, mask = prompts(rows)
        expected = eager(ids, pixels, 7, mask)
        for draft in (None, expected.ids, expected.ids.flip(1)):
            answer = decode(ids, pixels, 7, mask, draft)
            assert answer.ids.equal(expected.ids) and answer.ids.shape == (rows, 7)
            torch.testing.assert_close(answer.margins, expected.margins, atol=1e-3, rtol=1e-3)
        assert answer.forward_passes <= 7
    assert decode.description == "compiled"
    # 3 and 2 rows are one shape: each step of each shape is announced, and timed, once
    assert [line.split()[0] for line in said] == ["compiling", "compiled"] * 4


def test_a_whole_evaluation_has_few_shapes() -> None:
    shapes = {padded_shape(rows, tokens) for rows in range(1, 17) for tokens in range(20, 61)}
    assert shapes == {(1, 64), (4, 64), (16, 64)}
    assert padded_shape(5, 65) == (16, 2 * PROMPT_WIDTH)
    assert padded_shape(BATCH_SIZES[-1] + 1, 10)[0] == BATCH_SIZES[-1] + 1  # decoded eagerly as it comes


def test_an_a10_holds_openvla_7b_and_sixteen_simulators() -> None:
    """By arithmetic: weights in bfloat16, one cache of 16 rows at the second prompt width, a context a simulator, a fifth spare."""
    config = VLAConfig()
    with torch.device("meta"):
        weights = 2 * sum(parameter.numel() for parameter in VLA(config).parameters())
    text, columns = config.text_config, config.num_patches + 2 * PROMPT_WIDTH + 7
    cache = 2 * 2 * text.num_hidden_layers * 16 * columns * text.hidden_size
    simulators = 16 * 100 * 2**20  # an EGL context; not measured
    assert cache < 3.4 * 2**30
    assert weights + cache + simulators < 0.9 * 23 * 2**30


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


def test_an_input_that_plain_decoding_refuses_is_no_fault_of_the_compiler(vla: VLA) -> None:
    decode = CompiledActionDecoder(vla, compiler=failing(RuntimeError("broken")), say=lambda line: None)
    ids, pixels, mask = prompts(3)
    with pytest.raises(RuntimeError):
        decode(ids, pixels[..., :64], 7, mask)
    assert decode.description == "compiled"


def test_on_a_cpu_nothing_is_compiled(vla: VLA) -> None:
    assert type(decoder_for(vla)) is ActionDecoder and decoder_for(vla).description == "eager"
