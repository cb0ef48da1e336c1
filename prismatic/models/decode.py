"""Greedy decoding of one action: one pass over image and prompt, then one token at a time from a key-value cache; or a draft is verified.

In: right-padded prompts (B, T), pixel_values. Out: (B, action_dim) ids, always action ids: the original can answer `</s>` and then decode
*prompt* words as an action. Rows of different length decode side by side, each exactly as it would alone.

A draft is a guess of the whole action, such as the answer to the frame before. It rides along with the prompt: every column then answers which
word follows it, so the leading words that were guessed right are verified at once, and the rest are better guesses for another pass over the
answer's columns (Jacobi iteration). Each pass settles at least one word, so a draft never takes more passes than decoding without one.
The answer is plain decoding's whatever the draft: only rounding differs, because a matrix product's last bits change with its number of rows.
So an action with a word whose lead over the next best is within DOUBT is decoded plainly after all.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.models.llama import KVCache
from prismatic.models.quantize import head_rows

if TYPE_CHECKING:
    from prismatic.models.vla import VLA

# Logits: a lead smaller than this may be rounding. On the small model (CPU) a lead moved by up to 1.5e-5 in float32 and 0.06 in bfloat16 when a
# draft rode along; a full-size model and float16 have not been measured.
DOUBT = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass(frozen=True)
class Answer:
    """ids (B, action_dim) int64; lead (B, action_dim) float32: by how much each id's logit beats the second best; passes through the language
    model, the prompt's included; doubtful (B,) bool: rows that were decoded plainly after all.
    """

    ids: torch.Tensor
    lead: torch.Tensor
    passes: int
    doubtful: torch.Tensor


def with_empty_token(
    input_ids: torch.Tensor, lengths: torch.Tensor, *, empty: int, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append the empty token to every row that doesn't end in it. (B, T), (B,) → ids (B, T or T + 1) and new lengths (B,)."""
    rows = torch.arange(input_ids.shape[0], device=input_ids.device)
    missing = input_ids[rows, lengths - 1] != empty
    widened = F.pad(input_ids, (0, 1), value=pad)
    widened[rows, lengths] = torch.where(missing, empty, widened[rows, lengths])
    return widened, lengths + missing


def action_logits(head: nn.Module, hidden: torch.Tensor, first_id: int, last_id: int) -> torch.Tensor:
    """(..., H) → (..., last_id - first_id) float32: the action rows of the head only, unless an adapter is on it."""
    return head_rows(head, first_id, last_id)(hidden).float()


class Decoding:
    """One batch on its way: prompt, cache and answer in tensors of fixed shape; no method waits for the device.

    words (B, W): right-padded ids without the empty token; lengths (B,): words that count; pixel_values. `answer` (B, action_dim) holds the
    draft before `first` and ids ever after; `lead` (B, action_dim) says by how many logits each of them won.
    """

    def __init__(
        self, vla: "VLA", words: torch.Tensor, lengths: torch.Tensor, pixel_values: torch.Tensor, action_dim: int
    ) -> None:
        self.vla, self.action_dim = vla, action_dim
        self.words, self.lengths, self.pixel_values = words, lengths, pixel_values
        config, device = vla.config, words.device
        self.first_id, self.last_id = config.vocab_size - config.n_action_bins, config.vocab_size
        self.patches = config.num_images_in_input * config.num_patches
        self.prompt_columns = self.patches + words.shape[1] + 1  # the empty token may have to be added
        self.columns = torch.arange(self.prompt_columns + action_dim - 1, device=device)
        self.cache = KVCache(
            config.text_config, len(words), len(self.columns), like=vla.language_model.model.norm.weight
        )
        self.answer = torch.full((len(words), action_dim), self.first_id, device=device)
        self.lead = torch.zeros(self.answer.shape, device=device)

    def plain(self) -> torch.Tensor:
        """One pass over the prompt and one for each further word → ids (B, action_dim)."""
        prompt, end = self._prompt()
        positions = self.columns[: self.prompt_columns].expand(len(prompt), -1)
        hidden = self._read(prompt, positions, 0, end, wanted=(end - 1)[:, None])
        words = [self._best(hidden)]
        for step in range(self.action_dim - 1):
            hidden = self._read(self._embed(words[-1][0]), (end + step)[:, None], self.prompt_columns + step, end)
            words.append(self._best(hidden))
        ids, leads = zip(*words, strict=True)
        self.lead.copy_(torch.cat(leads, dim=1))
        return torch.cat(ids, dim=1)

    def first(self) -> torch.Tensor:
        """The pass over the prompt with the draft behind it. Returns how many leading words of it every row confirms, at most action_dim - 1."""
        self.answer.clamp_(self.first_id, self.last_id - 1)
        prompt, end = self._prompt()
        embeddings = torch.cat([prompt, self._embed(self.answer[:, :-1])], dim=1)
        positions = self.columns[: self.prompt_columns].expand(len(prompt), -1)
        positions = torch.cat([positions, self._answer_positions(end)], dim=1)
        behind = self.columns[self.prompt_columns :].expand(len(prompt), -1)
        wanted = torch.cat([(end - 1)[:, None], behind], dim=1)  # the prompt's last word answers with the first one
        return self._update(self._read(embeddings, positions, 0, end, wanted), 0)

    def again(self, start: int = 0) -> torch.Tensor:
        """One more pass over the answer's columns from `start` (settled ones before it) on. Returns as `first`."""
        end = self._ends()
        positions = self._answer_positions(end)[:, start:]
        hidden = self._read(self._embed(self.answer[:, start:-1]), positions, self.prompt_columns + start, end)
        return self._update(hidden, start + 1)

    def _ends(self) -> torch.Tensor:
        """(B,): position behind the prompt, where the answer begins."""
        return self.patches + self._completed()[1]

    def _completed(self) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.vla.config
        return with_empty_token(self.words, self.lengths, empty=config.empty_token_id, pad=config.pad_token_id)

    def _prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        words, lengths = self._completed()
        return self.vla.embed(words, self.pixel_values), self.patches + lengths

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.vla.language_model.model.embed_tokens(ids)

    def _answer_positions(self, end: torch.Tensor) -> torch.Tensor:
        return end[:, None] + self.columns[: self.action_dim - 1]

    def _read(
        self,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        first_column: int,
        end: torch.Tensor,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A pass that fills the columns from first_column on → hidden states of all of them, or of those wanted (B, N)."""
        columns = self.columns[first_column : first_column + embeddings.shape[1]]
        filled = (self.columns < end[:, None]) | (self.columns >= self.prompt_columns)  # (B, all): not a padded word

        def seen(by: torch.Tensor) -> torch.Tensor:
            return filled[:, None, None] & (self.columns <= by[..., None])

        # behind padded words nothing stands yet when the prompt is read alone: plain causal attention will do
        alone = embeddings.shape[1] == self.prompt_columns
        slots = self.cache.slots(
            columns, None if alone else seen(columns), wanted, None if wanted is None else seen(wanted[:, None])
        )
        return self.vla.language_model(embeddings, positions, slots)

    def _best(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (B, N, H) → the likeliest ids (B, N), and by how many logits each beats the second best."""
        logits = action_logits(self.vla.language_model.lm_head, hidden, self.first_id, self.last_id)
        values = logits.topk(2, dim=-1).values
        return self.first_id + logits.argmax(dim=-1), values[..., 0] - values[..., 1]

    def _update(self, hidden: torch.Tensor, start: int) -> torch.Tensor:
        """Answers from word `start` on, of hidden states (B, action_dim - start, H)."""
        ids, lead = self._best(hidden)
        same = (self.answer[:, start:-1] == ids[:, : self.action_dim - 1 - start]).cumprod(dim=1).sum(dim=1).amin()
        self.answer[:, start:] = ids
        self.lead[:, start:] = lead
        return start + same


class Passes(Protocol):
    """What decoding a batch takes: Decoding itself, or recorded graphs of its passes."""

    answer: torch.Tensor
    lead: torch.Tensor
    action_dim: int

    def plain(self) -> torch.Tensor: ...
    def first(self) -> torch.Tensor: ...
    def again(self, start: int) -> torch.Tensor: ...


def verified(passes: Passes, draft: torch.Tensor, doubt: float) -> Answer:
    """Plain decoding's answer by way of a draft (B, action_dim) of any numbers. The host waits for each pass: the next one depends on it."""
    passes.answer.copy_(draft)
    last = passes.action_dim - 1
    settled, count = int(passes.first()), 1
    while settled < last and count <= last:
        settled, count = int(passes.again(settled)), count + 1
    ids, lead = passes.answer.clone(), passes.lead.clone()
    doubtful = (lead.amin(dim=1) >= doubt).logical_not()  # NaN is doubtful too
    if settled < last:  # cannot be, unless the same pass gives two answers
        doubtful |= True
    if doubtful.any():
        ids = torch.where(doubtful[:, None], passes.plain(), ids)
        lead = torch.where(doubtful[:, None], passes.lead, lead)
        count += passes.action_dim
    return Answer(ids, lead, count, doubtful)


class Decoder:
    """Turns batches into actions, pass by pass in plain PyTorch."""

    def __init__(self, vla: "VLA") -> None:
        self.vla = vla

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        action_dim: int,
        attention_mask: torch.Tensor | None = None,
        draft: torch.Tensor | None = None,
    ) -> Answer:
        """(B, T) right-padded prompts, attention_mask None for full rows, draft (B, action_dim) of any numbers or None."""
        lengths = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
        if attention_mask is not None:
            lengths = attention_mask.sum(dim=1)
        passes = self._passes(input_ids, lengths, pixel_values, action_dim)
        if draft is None:
            ids = passes.plain()
            return Answer(ids, passes.lead, action_dim, torch.zeros(len(ids), dtype=torch.bool, device=ids.device))
        return verified(passes, draft.to(input_ids.device), DOUBT[self.vla.language_model.model.norm.weight.dtype])

    def _passes(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, pixel_values: torch.Tensor, action_dim: int
    ) -> Passes:
        norm = self.vla.language_model.model.norm.weight
        columns = self.vla.config.num_images_in_input * self.vla.config.num_patches + input_ids.shape[1] + 1
        if norm.device.type == "cpu" and norm.dtype == torch.bfloat16 and columns % 2:
            # oneDNN's bfloat16 products of an odd number of rows take up to half as long again
            input_ids = F.pad(input_ids, (0, 1), value=self.vla.config.pad_token_id)
        return Decoding(self.vla, input_ids, lengths, pixel_values, action_dim)
