"""The plain way to train and to act: what bench.py compares with, as the original's scripts do it.

Stock transformers Llama and its `generate`, peft's own casts, logits of every position and word, every block of both towers run (the original
runs the last one for nothing), nothing recomputed, unfused AdamW. The module's names are ours, so that weights and adapters go from one to the
other by name.
"""

import dataclasses
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers.generation.configuration_utils import CompileConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from prismatic.models.vla import IGNORE, VLA, VLAConfig


def run_for_nothing(last: nn.Module, block: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    """A hook behind the block before the last: the original runs the last one too, and drops what it says."""
    last(output)


class PlainVLA(VLA):
    """OpenVLA out of stock parts. Build it on the meta device and give it weights with `share`."""

    def __init__(self, config: VLAConfig) -> None:
        super().__init__(config)
        sizes = dataclasses.asdict(config.text_config)
        rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
        attention: dict[str, Any] = {"attn_implementation": "sdpa"}
        text = transformers.LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=False, **attention)
        stock: Any = transformers.LlamaForCausalLM(text)
        self.language_model = stock
        for tower in (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer):
            tower.blocks[-2].register_forward_hook(partial(run_for_nothing, tower.blocks[-1]))

    @classmethod
    def share(cls, vla: VLA) -> "PlainVLA":
        """The plain model on the weights of ours, which has no adapter yet; they stay one copy."""
        with torch.device("meta"):
            plain = cls(vla.config)
        weights = vla.state_dict()
        plain.load_state_dict(weights, assign=True)
        llama: Any = plain.language_model
        with weights["language_model.lm_head.weight"].device:
            # its table is no weight: made off the meta device
            llama.model.rotary_emb = LlamaRotaryEmbedding(llama.config)
        return plain

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """As VLA.forward; → the loss."""
        llama: Any = self.language_model
        embeddings = self.embed(input_ids, pixel_values)
        patches = (len(embeddings), embeddings.shape[1] - input_ids.shape[1])
        mask = torch.cat([attention_mask[:, :1], attention_mask.new_ones(patches), attention_mask[:, 1:]], dim=1)
        targets = torch.cat([labels[:, :1], labels.new_full(patches, IGNORE), labels[:, 1:]], dim=1)
        return llama(inputs_embeds=embeddings, attention_mask=mask, labels=targets, use_cache=False).loss


class PlainDecoder:
    """Greedy over the whole vocabulary by transformers' `generate`, on the weights of ours. Full rows only.

    best: with a static cache and the compiled step, transformers' own fast way; otherwise a growing cache, each kernel started by itself.
    """

    def __init__(self, vla: VLA, *, best: bool) -> None:
        self.model = PlainVLA.share(vla).eval().requires_grad_(False)
        self._options: dict[str, Any] = {"pad_token_id": vla.config.pad_token_id}
        if best:
            cuda = vla.language_model.lm_head.weight.device.type == "cuda"
            compiled = CompileConfig(mode="reduce-overhead" if cuda else "default")
            compiled._compile_all_devices = True  # type: ignore[attr-defined] # transformers leaves a CPU uncompiled otherwise
            self._options |= {"cache_implementation": "static", "compile_config": compiled}

    @torch.inference_mode()
    def __call__(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, action_dim: int) -> torch.Tensor:
        """(B, T) prompts that end in the empty token → (B, action_dim) ids."""
        embeddings = self.model.embed(input_ids, pixel_values)
        return self.model.language_model.generate(  # type: ignore[attr-defined] # its stubs deny it
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device),
            max_new_tokens=action_dim,
            min_new_tokens=action_dim,
            do_sample=False,
            **self._options,
        )
