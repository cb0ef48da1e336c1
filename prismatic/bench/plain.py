"""The plain way to train and to act: what bench.py compares with, as the original's scripts do it.

Stock transformers Llama and its `generate`, peft's own casts, logits of every position and word, every block of both towers run (the original
runs the last one for nothing), nothing recomputed, unfused AdamW. The module's names are ours, so that weights and adapters go from one to the
other by name.
"""

import dataclasses
from typing import Any

import torch
import transformers
from torch import nn
from transformers.generation.configuration_utils import CompileConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from prismatic.models.llama import LlamaConfig
from prismatic.models.projector import Projector
from prismatic.models.vision import CHANNELS, VisionBackbone
from prismatic.models.vla import IGNORE, VLA, VLAConfig


def stock_llama(text: LlamaConfig) -> transformers.LlamaForCausalLM:
    """transformers' own model of these sizes, with random weights."""
    sizes = dataclasses.asdict(text)
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    config = transformers.LlamaConfig(
        **sizes, rope_parameters=rope, tie_word_embeddings=False, attn_implementation="sdpa"
    )
    return transformers.LlamaForCausalLM(config)


class PlainVLA(nn.Module):
    """OpenVLA out of stock parts. Build it on the meta device and give it weights with `share`."""

    def __init__(self, config: VLAConfig) -> None:
        super().__init__()
        self.vision_backbone = VisionBackbone(
            config.timm_model_ids, config.tiny_timm_kwargs, image_size=config.image_size, stem=config.vision_stem
        )
        self.projector = Projector(self.vision_backbone.width, config.text_config.hidden_size)
        self.language_model = stock_llama(config.text_config)

    @classmethod
    def share(cls, vla: VLA) -> "PlainVLA":
        """The plain model on the weights of ours, which has no adapter yet; they stay one copy."""
        with torch.device("meta"):
            plain = cls(vla.config)
        weights = vla.state_dict()
        plain.load_state_dict(weights, assign=True)
        llama: Any = plain.language_model
        with weights["language_model.lm_head.weight"].device:
            llama.model.rotary_emb = LlamaRotaryEmbedding(
                llama.config
            )  # its table is no weight: made off the meta device
        return plain

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """As VLA.embed."""
        words = self.language_model.get_input_embeddings()(input_ids)
        patches = self.projector(self._features(pixel_values.to(words.dtype))).to(words.dtype)
        return torch.cat([words[:, :1], patches, words[:, 1:]], dim=1)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """As VLA.forward; → the loss."""
        llama: Any = self.language_model
        embeddings = self.embed(input_ids, pixel_values)
        patches = (len(embeddings), embeddings.shape[1] - input_ids.shape[1])
        mask = torch.cat([attention_mask[:, :1], attention_mask.new_ones(patches), attention_mask[:, 1:]], dim=1)
        targets = torch.cat([labels[:, :1], labels.new_full(patches, IGNORE), labels[:, 1:]], dim=1)
        return llama(inputs_embeds=embeddings, attention_mask=mask, labels=targets, use_cache=False).loss

    def _features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 6·n, S, S) → (B, n·N, D): second-to-last block's output, the last one run all the same."""
        vision = self.vision_backbone
        images = pixel_values.reshape(-1, 2 * CHANNELS, *pixel_values.shape[-2:])
        features = []
        for tower, pixels in zip(
            (vision.featurizer, vision.fused_featurizer), images.split(CHANNELS, dim=1), strict=True
        ):
            x = tower._pos_embed(tower.patch_embed(pixels))
            outputs = [x := block(x) for block in tower.blocks]
            features.append(outputs[-2][:, tower.num_prefix_tokens :])
        return torch.cat(features, dim=-1).reshape(pixel_values.shape[0], -1, vision.width)


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
