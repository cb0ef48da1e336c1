"""Greedy decoding of one action: one pass over image and prompt, then one token at a time from a key-value cache.

In: right-padded prompts (B, T), pixel_values. Out: (B, action_dim) ids, always action ids: the original can answer `</s>` and then decode
*prompt* words as an action. Rows of different length decode side by side, each exactly as it would alone.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.models.llama import KVCache
from prismatic.models.quantize import head_rows

if TYPE_CHECKING:
    from prismatic.models.vla import VLA


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
    """(B, H) → (B, last_id - first_id) float32: the action rows of the head only, unless an adapter is on it."""
    return head_rows(head, first_id, last_id)(hidden).float()


def greedy_action_ids(
    vla: "VLA",
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    action_dim: int,
    attention_mask: torch.Tensor | None,
    margins: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """See VLA.generate_action_ids."""
    config, model = vla.config, vla.language_model
    batch, width = input_ids.shape
    lengths = torch.full((batch,), width, device=input_ids.device)
    if attention_mask is not None:
        lengths = attention_mask.sum(dim=1)
    input_ids, lengths = with_empty_token(input_ids, lengths, empty=config.empty_token_id, pad=config.pad_token_id)
    embeddings = vla.embed(input_ids, pixel_values)  # (B, P + T, H)
    patches = embeddings.shape[1] - input_ids.shape[1]
    positions = torch.arange(embeddings.shape[1], device=embeddings.device).expand(batch, -1)
    cache = KVCache(config.text_config, batch, embeddings.shape[1] + action_dim, like=embeddings)
    hidden = model(embeddings, positions, cache)
    position = patches + lengths - 1  # (B,): of the last word of each row
    last = hidden[torch.arange(batch, device=hidden.device), position]
    first_id, last_id = config.vocab_size - config.n_action_bins, config.vocab_size
    ids = []
    for step in range(action_dim):
        logits = action_logits(model.lm_head, last, first_id, last_id)
        ids.append(first_id + logits.argmax(dim=-1))
        if margins is not None:
            best, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
            margins.append(best - second)
        if step + 1 < action_dim:
            position = position + 1  # overwrites the slot of a padded word, which nothing has read
            words = model.model.embed_tokens(ids[-1][:, None])
            last = model(words, position[:, None], cache)[:, 0]
    return torch.stack(ids, dim=1)
