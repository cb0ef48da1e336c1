"""Greedy decoding of one action: the prompt in one forward pass, then all further tokens of the action verified at once, until nothing changes.

In: right-padded prompts (B, T), pixel_values, perhaps a draft. Out: (B, action_dim) ids, always action ids: the original can answer `</s>` and
then decode tokens of the *prompt* as an action. Rows of different length decode side by side, each exactly as it would alone.

A draft is a guess of the whole action, such as the answer to the frame before. `prefill` reads the prompt and gives the first token. `verify`
reads all columns of the answer but the last and says which token follows each: tokens guessed right are accepted, the others are better
guesses for the next pass (Jacobi iteration). Each pass settles at least one token, so there are at most action_dim passes; a right draft takes 2.
Surprising: without a draft the very same passes run, from a draft of middle tokens. A token depends only on columns before it and always comes
out of a pass of the same shape, so its bits, and with them the answer, don't depend on the draft: no tolerance is needed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prismatic.models.llama import Layers, cache_views, empty_cache

Tensors = tuple[Tensor, ...]


class Answer(NamedTuple):
    """ids (B, action_dim) int64, of chunks as VLA.answer; margins (B, numbers) float32: by how much each id's logit beats the second best (the
    top-1 margin); forward_passes through the language model, the prompt's included.
    """

    ids: Tensor
    margins: Tensor
    forward_passes: int


def with_empty_token(input_ids: Tensor, lengths: Tensor, *, empty: int, pad: int) -> tuple[Tensor, Tensor]:
    """Append the empty token to every row that doesn't end in it. (B, T), (B,) → ids (B, T + 1) and new lengths (B,)."""
    rows = torch.arange(input_ids.shape[0], device=input_ids.device)
    missing = input_ids[rows, lengths - 1] != empty
    widened = F.pad(input_ids, (0, 1), value=pad)
    widened[rows, lengths] = torch.where(missing, empty, widened[rows, lengths])
    return widened, lengths + missing


def action_logits(head: nn.Module, hidden: Tensor, first_id: int, last_id: int) -> Tensor:
    """(…, H) → (…, last_id - first_id) float32. Of a plain head only the action rows are read, less than a hundredth of it."""
    if type(head) is nn.Linear and type(head.weight) is nn.Parameter:
        return F.linear(hidden, head.weight[first_id:last_id]).float()
    return head(hidden)[..., first_id:last_id].float()


def best_tokens(vla: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, N, H) → the likeliest action ids (B, N) and their top-1 margins (B, N)."""
    first_id, last_id = vla.config.vocab_size - vla.config.n_action_bins, vla.config.vocab_size
    logits = action_logits(vla.language_model.lm_head, hidden, first_id, last_id)
    values = logits.topk(2, dim=-1).values
    return first_id + logits.argmax(dim=-1), values[..., 0] - values[..., 1]


def prefill(vla: Any, layers: Layers, input_ids: Tensor, lengths: Tensor, pixel_values: Tensor) -> Tensors:
    """Read the prompts (B, T) of `lengths` tokens into the cache → first ids (B, 1), margins (B, 1), and where the answer begins (B,).

    Waits for nothing on the device; shapes depend on nothing but the arguments' shapes.
    """
    config = vla.config
    input_ids, lengths = with_empty_token(input_ids, lengths, empty=config.empty_token_id, pad=config.pad_token_id)
    embeddings = vla.embed(input_ids, pixel_values)
    ends = embeddings.shape[1] - input_ids.shape[1] + lengths
    columns = torch.arange(layers[0][0].shape[2], device=ends.device)
    output_positions = (ends - 1)[:, None]
    # plain causal attention will do: behind padding nothing is read; only the last layer's one query needs a mask
    output_mask = (columns <= output_positions)[:, None, None]
    columns = columns[: embeddings.shape[1]]
    caches = cache_views(layers, columns, None)
    caches[-1] = caches[-1]._replace(attn_mask=output_mask, output_positions=output_positions)
    hidden = vla.language_model(embeddings, columns.expand(len(input_ids), -1), caches)
    return *best_tokens(vla, hidden), ends


def verify(vla: Any, layers: Layers, tokens: Tensor, ends: Tensor) -> Tensors:
    """tokens (B, N) of the answer, guesses or not, written behind the prompts that end at `ends` → the ids that follow each (B, N), margins."""
    columns = torch.arange(layers[0][0].shape[2], device=ends.device)
    first = len(columns) - tokens.shape[1]  # the answer's columns are the last
    filled = (columns < ends[:, None]) | (columns >= first)  # (B, length): not the prompt's padding
    attn_mask = filled[:, None, None] & (columns <= columns[first:, None])
    positions = ends[:, None] + columns[: tokens.shape[1]]
    embeddings = vla.language_model.model.embed_tokens(tokens)
    return best_tokens(vla, vla.language_model(embeddings, positions, cache_views(layers, columns[first:], attn_mask)))


class ActionDecoder:
    """Turns batches into actions, or chunks of them, kernel by kernel in plain PyTorch. One at a time: all calls share one cache."""

    def __init__(self, vla: Any) -> None:
        self.vla = vla
        self._cache: Layers = []

    @property
    def description(self) -> str:
        """How forward passes are run, as a result records it."""
        return "eager"

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        action_dim: int,
        attention_mask: Tensor | None = None,
        draft: Tensor | None = None,
    ) -> Answer:
        """(B, T) right-padded prompts, attention_mask None for full rows, draft (B, action_dim) of any numbers or None."""
        config, device = self.vla.config, input_ids.device
        lengths = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).sum(dim=1)
        first_id, last_id = config.vocab_size - config.n_action_bins, config.vocab_size
        if draft is None:
            draft = torch.full((len(input_ids), action_dim), (first_id + last_id) // 2)
        patches = config.num_images_in_input * config.num_patches
        layers = self._layers(len(input_ids), patches + input_ids.shape[1] + 1 + action_dim - 1)
        first, margins, ends = self._run(prefill, layers, input_ids, lengths, pixel_values)
        ids = torch.cat([first, draft[:, 1:].to(device).clamp(first_id, last_id - 1)], dim=1)
        passes, settled = 1, action_dim == 1
        while not settled:
            following, following_margins = self._run(verify, layers, ids[:, :-1], ends)
            settled = passes == action_dim - 1 or following[:, :-1].equal(ids[:, 1:-1])  # waits for the device
            ids, passes = torch.cat([first, following], dim=1), passes + 1
            if settled:
                margins = torch.cat([margins, following_margins], dim=1)
        return Answer(ids, margins, passes)

    @torch.inference_mode()
    def chunk(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        proprio: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Answer:
        """VLA.answer to these prompts, of a model of chunks. The host waits for the prompts' lengths once."""
        config = self.vla.config
        lengths = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).sum(dim=1)
        ids, lengths = with_empty_token(input_ids, lengths, empty=config.empty_token_id, pad=config.pad_token_id)
        shortest, longest = torch.stack([lengths.min(), lengths.max()]).tolist()
        hidden = self.vla.before_actions(ids[:, :longest], lengths, pixel_values, proprio, shortest != longest)
        answered, margins = self.vla.answer(hidden)
        return Answer(answered, margins, 1)

    def _layers(self, batch: int, length: int) -> Layers:
        """Keys and values for this batch: views of one allocation, which grows to the largest that was asked for."""
        rows, _, columns, _ = self._cache[0][0].shape if self._cache else (0, 0, 0, 0)
        if rows < batch or columns < length:
            self._grow(max(batch, rows), max(length, columns))
        return [(keys[:batch, :, :length], values[:batch, :, :length]) for keys, values in self._cache]

    def release(self) -> None:
        """Let the cache go: after a want of memory, a smaller one may do."""
        self._cache = []

    def _grow(self, rows: int, columns: int) -> None:
        self._cache = []  # frees it before the larger one is made
        like = self.vla.language_model.model.norm.weight
        self._cache = empty_cache(self.vla.config.text_config, rows, columns, like=like)

    def _run(self, step: Any, layers: Layers, *inputs: Tensor) -> Tensors:
        """One forward pass."""
        return step(self.vla, layers, *inputs)
