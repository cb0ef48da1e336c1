"""The joined model: image towers → projector → Llama. In: token ids, pixel_values, labels. Out: loss and logits, or 7 action ids.

Sequence: [BOS][patches of every image][rest of the text]; patches attend like text (plain causal). Surprising: logits are computed only where
labels are (8 of ~290 positions) unless asked, because a full (B, 290, 32064) table is most of the memory of a training step.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.errors import ConfigError
from prismatic.models.config_file import DINO_ID, SIGLIP_ID, read_model_config
from prismatic.models.decode import ActionDecoder
from prismatic.models.llama import Llama, LlamaConfig
from prismatic.models.projector import Projector
from prismatic.models.vision import VisionBackbone

IGNORE = -100  # a label that is not trained on
PATCH_SIZE = 14  # pixels, of both published towers
ARCH_SPECIFIER, RESIZE_STRATEGY = "no-align+fused-gelu-mlp", "resize-naive"
ActionHead = Literal["tokens", "parallel", "l1"]


@dataclass(frozen=True)
class VLAConfig:
    """Sizes of everything; the defaults are openvla-7b. Field names are config.json's where it has them."""

    image_size: int = 224  # pixels a side
    num_images_in_input: int = 1  # 2 adds the wrist camera (OpenVLA-OFT's name)
    # how hidden states become actions: token by token (OpenVLA), all tokens of a chunk in one forward pass, or regressed (OpenVLA-OFT)
    action_head: ActionHead = "tokens"
    num_actions_chunk: int = 1  # actions that one query answers with: 8 in OpenVLA-OFT's LIBERO recipe
    action_dim: int = 7  # numbers of one action; a token head takes any number
    proprio_dim: int = 0  # numbers of the robot's state that the model reads: 0 none, 8 in OpenVLA-OFT's LIBERO recipe
    timm_model_ids: tuple[str, str] = (DINO_ID, SIGLIP_ID)
    tiny_timm_kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # sizes of small towers, by timm id
    vision_stem: tuple[int, ...] = ()  # channels of a convolutional stem in front of small towers
    text_config: LlamaConfig = field(default_factory=LlamaConfig)
    pad_to_multiple_of: int = 64  # rows that the table has beyond the words
    n_action_bins: int = 256
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 32000
    empty_token_id: int = 29871  # "▁", which stands between the prompt and the action

    @property
    def vocab_size(self) -> int:
        """Words without filling rows: 32000. The last n_action_bins of them are actions."""
        return self.text_config.vocab_size - self.pad_to_multiple_of

    @property
    def num_patches(self) -> int:
        """Patches of one image: 256."""
        patch = self.tiny_timm_kwargs.get(self.timm_model_ids[0], {}).get("patch_size", PATCH_SIZE)
        return (self.image_size // patch) ** 2

    @classmethod
    def from_json(cls, path: Path) -> "VLAConfig":
        """Read config.json of an OpenVLA folder or of the native Prismatic layout. ConfigError for an architecture that this is not."""
        raw = read_model_config(Path(path))
        native = isinstance(raw.get("vla"), dict)
        if native and "dinosiglip-224px+7b" not in str(raw["vla"].get("base_vlm")):
            raise ConfigError(
                f"{path}: base_vlm {raw['vla'].get('base_vlm')!r} is not prism-dinosiglip-224px+7b, the only one built here"
            )
        if not native:
            _check_architecture(raw, path)
        text = {**raw.get("text_config", {}), **raw.get("tiny_text_config", {})}
        known = {f.name for f in dataclasses.fields(LlamaConfig)}
        values = {f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw and f.name != "text_config"}
        for name in ("timm_model_ids", "vision_stem"):
            if name in values:
                values[name] = tuple(values[name])
        if "image_sizes" in raw:
            values["image_size"] = raw["image_sizes"][0]
        sizes = {name: value for name, value in text.items() if name in known}
        return cls(text_config=LlamaConfig(**sizes), **values)

    def to_json(self) -> dict[str, Any]:
        """config.json as OpenVLA's own code reads it; what differs from openvla-7b's sizes stands under this project's names."""
        defaults = VLAConfig()
        own = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("image_size", "text_config")
        }
        always = ("timm_model_ids", "pad_to_multiple_of", "n_action_bins", "pad_token_id")
        return {
            "architectures": ["OpenVLAForActionPrediction"],
            "model_type": "openvla",
            "arch_specifier": ARCH_SPECIFIER,
            "vision_backbone_id": "dinosiglip-vit-so-224px",
            "llm_backbone_id": "llama2-7b-pure",
            "hf_llm_id": "meta-llama/Llama-2-7b-hf",
            "image_resize_strategy": RESIZE_STRATEGY,
            "image_sizes": [self.image_size, self.image_size],
            "timm_override_act_layers": [None, None],
            "use_fused_vision_backbone": True,
            "llm_max_length": 2048,
            "output_projector_states": False,
            "text_config": {
                "model_type": "llama",
                "pad_token_id": self.pad_token_id,
                **dataclasses.asdict(self.text_config),
            },
            **{name: value for name, value in own.items() if name in always or value != getattr(defaults, name)},
        }


def _check_architecture(raw: Mapping[str, Any], path: Path) -> None:
    expected = {
        "model_type": "openvla",
        "arch_specifier": ARCH_SPECIFIER,
        "image_resize_strategy": RESIZE_STRATEGY,
        "use_fused_vision_backbone": True,
    }
    for name, value in expected.items():
        if raw.get(name) != value:
            raise ConfigError(f"{path}: {name} is {raw.get(name)!r}, but only {value!r} (openvla-7b) is built here")


@dataclass
class VLAOutput:
    """logits: float32, (B, n_images·num_patches + T, rows) with all_logits, else (labels that count, rows), row by row of the batch."""

    logits: torch.Tensor
    loss: torch.Tensor | None


class VLA(nn.Module):
    """`vision_backbone`, `projector`, `language_model`: parameters under the published checkpoint's names."""

    def __init__(self, config: VLAConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_backbone = VisionBackbone(
            config.timm_model_ids, config.tiny_timm_kwargs, image_size=config.image_size, stem=config.vision_stem
        )
        self.projector = Projector(self.vision_backbone.width, config.text_config.hidden_size)
        self.language_model = Llama(config.text_config)

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks that run, in their order: of the towers, then of the decoder. What is sharded or recomputed piece by piece."""
        yield from self.vision_backbone.blocks()
        yield from self.language_model.model.layers

    def unread_parameters(self) -> list[str]:
        """Names of the parameters that never get a gradient, because no output depends on them."""
        return [f"vision_backbone.{name}" for name in self.vision_backbone.unread_parameters()]

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, T) ids and (B, 6·n_images, S, S) pixels → (B, P + T, H) with the P patches behind BOS."""
        words = self.language_model.model.embed_tokens(input_ids)
        patches = self.projector(self.vision_backbone(pixel_values.to(words.dtype)))
        return torch.cat([words[:, :1], patches.to(words.dtype), words[:, 1:]], dim=1)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        all_logits: bool = False,
    ) -> VLAOutput:
        """One pass over a right-padded batch; attention_mask is taken for OpenVLA's sake: behind right padding nothing is read.

        Loss: mean cross entropy over the labels of the batch that are not -100, each predicted from the position before it.
        """
        embeddings = self.embed(input_ids, pixel_values)  # (B, P + T, H)
        positions = torch.arange(embeddings.shape[1], device=embeddings.device).expand(embeddings.shape[:2])
        hidden = self.language_model(embeddings, positions)
        if all_logits or labels is None:
            logits = self.language_model.lm_head(hidden).float()
            if labels is None:
                return VLAOutput(logits, None)
        predicting = hidden[:, -labels.shape[1] : -1]  # position P + t - 1 predicts label t
        following = labels[:, 1:]
        counts = following != IGNORE
        following = following[counts]
        chosen = self.language_model.lm_head(predicting[counts]).float()  # (labels that count, rows)
        loss = F.cross_entropy(chosen, following)
        return VLAOutput(logits if all_logits else chosen, loss)

    @torch.inference_mode()
    def generate_action_ids(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        action_dim: int = 7,
        attention_mask: torch.Tensor | None = None,
        margins: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Greedy over the action ids: (B, T) right-padded prompts → (B, action_dim) int64. See decode.py.

        margins: a list that gets, for each id, by how much its logit beats the second best: (B,) float32.
        """
        answer = ActionDecoder(self)(input_ids, pixel_values, action_dim, attention_mask)
        if margins is not None:
            margins.extend(answer.margins.unbind(dim=1))
        return answer.ids
