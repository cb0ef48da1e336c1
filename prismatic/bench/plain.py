"""The plain way to train: what bench.py compares with. Stock transformers Llama, peft's own casts, logits of every position, every block of
both towers run, nothing recomputed, unfused AdamW: as the original's training script does it.

The module's names are ours, so that weights and adapters go from one to the other by name.
"""

from typing import Any

import torch
from torch import nn

from prismatic.bench.stock import make_frequencies, stock_llama
from prismatic.models.projector import Projector
from prismatic.models.vision import CHANNELS, VisionBackbone
from prismatic.models.vla import IGNORE, VLA, VLAConfig


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
        make_frequencies(plain.language_model, weights["language_model.lm_head.weight"].device)
        return plain

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """As VLA.forward; → the loss."""
        llama: Any = self.language_model
        words = llama.get_input_embeddings()(input_ids)
        patches = self.projector(self._features(pixel_values.to(words.dtype))).to(words.dtype)
        embeddings = torch.cat([words[:, :1], patches, words[:, 1:]], dim=1)
        seen = attention_mask.new_ones(patches.shape[:2])
        mask = torch.cat([attention_mask[:, :1], seen, attention_mask[:, 1:]], dim=1)
        ignored = labels.new_full(patches.shape[:2], IGNORE)
        targets = torch.cat([labels[:, :1], ignored, labels[:, 1:]], dim=1)
        return llama(inputs_embeds=embeddings, attention_mask=mask, labels=targets, use_cache=False).loss

    def _features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 6·n, S, S) → (B, n·N, D): second-to-last block's output, the last one run all the same."""
        vision = self.vision_backbone
        images = pixel_values.reshape(-1, 2 * CHANNELS, *pixel_values.shape[-2:])
        features = []
        for tower, pixels in (
            (vision.featurizer, images[:, :CHANNELS]),
            (vision.fused_featurizer, images[:, CHANNELS:]),
        ):
            x = tower._pos_embed(tower.patch_embed(pixels))
            outputs = []
            for block in tower.blocks:
                x = block(x)
                outputs.append(x)
            features.append(outputs[-2][:, tower.num_prefix_tokens :])
        return torch.cat(features, dim=-1).reshape(pixel_values.shape[0], -1, vision.width)
