"""Greedy decoding (the original's ids: test_vla.py): batched rows equal to single ones, no word but an action, and drafts that change nothing."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prismatic.models.decode import ActionDecoder, prefill, verify
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import VLA


def test_only_action_ids_come_out_even_where_another_word_is_likelier() -> None:
    vla = random_vla(TINY, seed=1)
    with torch.no_grad():
        vla.language_model.lm_head.weight[2] = 100 * vla.language_model.lm_head.weight[TINY.vocab_size - 1].abs()
    ids = vla.generate_action_ids(torch.tensor([[1, 5, 6, 7]]), torch.randn(1, 12, 128, 128), 7)
    assert ids.shape == (1, 7) and ids.min() >= TINY.vocab_size - 256 and ids.max() < TINY.vocab_size


def test_the_empty_token_is_appended_only_where_it_is_missing() -> None:
    vla = random_vla(TINY, seed=1)
    pixels = torch.randn(1, 12, 128, 128)
    without, with_it = torch.tensor([[1, 5, 6, 7]]), torch.tensor([[1, 5, 6, 7, TINY.empty_token_id]])
    torch.testing.assert_close(vla.generate_action_ids(without, pixels), vla.generate_action_ids(with_it, pixels))


FIRST, LAST = TINY.vocab_size - TINY.n_action_bins, TINY.vocab_size - 1


@pytest.fixture(scope="module")
def lively() -> VLA:
    """A small random model, whose answers depend on the picture and on the words before: what a layer adds outweighs the word it reads."""
    vla = random_vla(TINY, seed=3).eval()
    for name, parameter in vla.language_model.model.layers.named_parameters():
        if "norm" not in name:
            parameter.data *= 4
    return vla


def prompts(batch: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids (B, 12) of 5 to 12 words, mask, pixels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 700, (batch, 12), generator=generator)
    mask = torch.arange(12) < torch.randint(5, 13, (batch, 1), generator=generator)
    ids[:, 0] = TINY.bos_token_id
    pixels = torch.randn(batch, 12, 128, 128, generator=generator)
    return ids.masked_fill(~mask, TINY.pad_token_id), mask, pixels


def test_sixty_four_rows_answer_as_each_alone(lively: VLA) -> None:
    ids, mask, pixels = prompts(64)
    together = lively.generate_action_ids(ids, pixels, 7, mask)
    assert len({tuple(row.tolist()) for row in together}) > 50
    for row in range(0, 64, 9):
        alone = ids[row : row + 1, : int(mask[row].sum())]
        assert lively.generate_action_ids(alone, pixels[row : row + 1])[0].tolist() == together[row].tolist()


def test_cached_tokens_equal_a_full_pass_over_prompt_and_answer(lively: VLA) -> None:
    ids, _, pixels = prompts(2)
    ids = torch.cat([ids.clamp(max=700), torch.full((2, 1), TINY.empty_token_id)], dim=1)
    decoded = ActionDecoder(lively)(ids, pixels, 7)
    with torch.inference_mode():
        logits = lively(torch.cat([ids, decoded.ids], dim=1), None, pixels).logits[:, -8:-1, FIRST : LAST + 1]
    best = logits.topk(2, dim=-1)
    assert (best.indices[..., 0] + FIRST).equal(decoded.ids)
    torch.testing.assert_close(decoded.margins, -best.values.diff(dim=-1)[..., 0], atol=1e-3, rtol=0)


def hostile_drafts(answer: torch.Tensor) -> dict[str, torch.Tensor]:
    other = FIRST + (answer - FIRST + 1) % 256  # wrong everywhere
    places = torch.arange(answer.shape[1])
    return {
        "right": answer,
        "half right": torch.where(places == 3, other, answer),
        "only the last wrong": torch.where(places == 6, other, answer),
        "random": torch.randint(FIRST, LAST + 1, answer.shape, generator=torch.Generator().manual_seed(0)),
        "another row's": answer.roll(1, dims=0),
        "words": torch.full_like(answer, 5),
        "out of range": torch.where(places % 2 == 0, -(2**40), 2**40).expand_as(answer),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 5])
def test_no_draft_changes_a_bit_of_the_answer(lively: VLA, batch: int, dtype: torch.dtype) -> None:
    ids, mask, pixels = prompts(batch, seed=batch)
    vla = copy.deepcopy(lively).to(dtype)
    decode, pixels = ActionDecoder(vla), pixels.to(dtype)
    plain = decode(ids, pixels, 7, mask)
    for name, draft in hostile_drafts(plain.ids).items():
        answer = decode(ids, pixels, 7, mask, draft)
        assert answer.ids.equal(plain.ids) and answer.margins.equal(plain.margins), name
        assert 2 <= answer.forward_passes <= 7, name
        if name in ("right", "only the last wrong"):  # nothing is behind the last token
            assert answer.forward_passes == 2
        if name == "half right":
            assert 3 <= answer.forward_passes <= 5
    assert decode(ids, pixels, 1, mask).ids.equal(plain.ids[:, :1])


def test_all_calls_share_one_cache_and_what_it_held_is_not_seen(lively: VLA) -> None:
    decode = ActionDecoder(lively)
    small, large = prompts(1, seed=1), prompts(5, seed=5)
    expected = [ActionDecoder(lively)(ids, pixels, 7, mask).ids for ids, mask, pixels in (small, large, small)]
    for (ids, mask, pixels), right in zip((small, large, small), expected, strict=True):
        assert decode(ids, pixels, 7, mask).ids.equal(right)
    (keys, _), (narrow, _) = decode._cache[0], decode._layers(1, 140)[0]
    assert narrow.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()


class Watched(TorchDispatchMode):
    """Refuses what makes the host wait for a device, and remembers the widths of matrices that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive"), name
        result = func(*args, **(kwargs or {}))
        if name in ("mm", "addmm", "bmm", "linear"):
            self.widths.add(result.shape[-1])
        return result


def test_no_pass_waits_for_the_device_nor_multiplies_more_of_the_head_than_the_actions(lively: VLA) -> None:
    ids, mask, pixels = prompts(2)
    with torch.inference_mode():
        layers = ActionDecoder(lively)._layers(2, 128 + 13 + 6)
        with Watched() as watched:
            first, _, ends = prefill(lively, layers, ids, mask.sum(dim=1), pixels)
            verify(lively, layers, first.expand(-1, 6), ends)
    assert TINY.n_action_bins in watched.widths
    assert not watched.widths & {TINY.vocab_size, TINY.text_config.vocab_size}
