"""The decoder of Llama-2 in plain PyTorch, under the published names. In: embeddings (B, T, H). Out: hidden states (B, T, H).

Surprising: RoPE's cos and sin and RMSNorm's mean are computed in float32 whatever the weights are, then cast; right padding needs no mask,
because nothing before it can see it; a place in the cache is a *column* of the padded batch, not a position: rows of different length write the same
column at the same time, each with its own position, and a mask says what a row has.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional as F

from prismatic.ranges import Few

# what a config.json may say
Size = Annotated[int, Meta(ge=1, le=2**20)]


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the decoder; the defaults are Llama-2-7B as OpenVLA exported it. Keys and defaults of its `text_config`."""

    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: Few = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size = 32
    vocab_size: Size = 32064  # rows of the embedding table: 32000 tokens, <PAD>, and filling up to a multiple of 64
    rms_norm_eps: Annotated[float, Meta(gt=0, lt=1)] = 1e-6
    rope_theta: Annotated[float, Meta(ge=1, le=1e9)] = 10000.0
    max_position_embeddings: Size = 2048


Layers = list[tuple[Tensor, Tensor]]  # a KV cache: keys and values (B, kv_heads, length, D) of each layer


class CacheView(NamedTuple):
    """One layer's part of a KV cache in one forward pass: what it holds, where this pass writes, what its queries attend to.

    attn_mask (B, 1, T, length) bool, True where attended; None: causal among the columns of this pass. output_positions (B, N): those among
    the T whose output is needed, if not all; attn_mask is then (B, 1, N, length).
    """

    keys: Tensor
    values: Tensor
    columns: Tensor  # (T,) int64: the columns that this pass fills
    attn_mask: Tensor | None
    output_positions: Tensor | None = None


def empty_cache(config: LlamaConfig, batch: int, length: int, *, like: Tensor) -> Layers:
    """Keys and values of every layer, allocated once: column c of row b holds what column c of that row left there."""
    shape = (batch, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.num_hidden_layers)]


def cache_views(layers: Layers, columns: Tensor, attn_mask: Tensor | None) -> list[CacheView]:
    """Each layer's view in a pass that fills columns (T,)."""
    return [CacheView(keys, values, columns, attn_mask) for keys, values in layers]


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (B, T) → cos, sin (B, 1, T, head_dim) of rotate-half RoPE, computed in float32; sin negated where `_rotate` wants -x."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * (1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, queries: Tensor, x: Tensor, cos_sin, cache: CacheView | None, attn_mask: Tensor | None) -> Tensor:
        """queries: x, or x at its output positions. attn_mask (B, 1, 1, T) bool: which positions of x all others attend to; None: all."""
        batch, length, _ = x.shape
        q = self.q_proj(queries).view(batch, -1, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        k = _rotate(k, *cos_sin)
        if cache is not None and cache.output_positions is not None:
            cos_sin = [torch.take_along_dim(part, cache.output_positions[:, None, :, None], dim=2) for part in cos_sin]
        q = _rotate(q, *cos_sin)
        causal = self.causal
        if cache is not None:
            cache.keys.index_copy_(2, cache.columns, k)
            cache.values.index_copy_(2, cache.columns, v)
            if cache.attn_mask is not None:
                k, v, attn_mask, causal = cache.keys, cache.values, cache.attn_mask, False
        grouped = self.kv_heads != self.heads
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=causal, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig, *, causal: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, causal=causal)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos_sin, cache: CacheView | None, attn_mask: Tensor | None) -> Tensor:
        normed = queries = self.input_layernorm(x)
        if cache is not None and cache.output_positions is not None:
            x, queries = (torch.take_along_dim(part, cache.output_positions[..., None], dim=1) for part in (x, normed))
        x = x + self.self_attn(queries, normed, cos_sin, cache, attn_mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embedding table, layers and final norm; `language_model.model.*` in the checkpoint."""

    def __init__(self, config: LlamaConfig, *, causal: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, causal=causal) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """Decoder and head. Call it with embeddings; `lm_head` turns hidden states into logits.

    causal False: every position attends to all others, also to later ones, as OpenVLA-OFT does it.
    """

    def __init__(self, config: LlamaConfig, *, causal: bool = True) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, causal=causal)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        caches: list[CacheView] | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """embeddings (B, T, H), positions (B, T) → normed hidden states (B, T, H), or (B, N, H) at the output positions.

        caches: one a layer (cache_views); None reads nothing and keeps nothing. attn_mask (B, 1, 1, T) bool: the positions that are no
        padding, where not causal; None: all.
        """
        config = self.config
        cos_sin = rotary(
            positions, config.hidden_size // config.num_attention_heads, config.rope_theta, embeddings.dtype
        )
        x = embeddings
        for number, layer in enumerate(self.model.layers):
            x = layer(x, cos_sin, None if caches is None else caches[number], attn_mask)
        return self.model.norm(x)
