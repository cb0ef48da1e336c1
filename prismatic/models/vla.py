"""The joined model: image towers → projector → Llama → actions. In: token ids, pixel_values, state. Out: loss and logits, or actions.

Sequence: [BOS][patches of every image][the state's token][rest of the text]; patches attend like text: causally where tokens are decoded one by
one, in all directions where a chunk of actions comes out of one forward pass (heads.py). Surprising: logits are computed only where labels are
(8 of ~290 positions) unless asked, because a full (B, 290, 32064) table is most of the memory of a training step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional as F

from action_tokenizer import ActionTokenizer
from prismatic.errors import ConfigError
from prismatic.models.decode import ActionDecoder, best_tokens
from prismatic.models.heads import L1RegressionHead, ProprioProjector, before_blanks, bin_centers, with_blanks
from prismatic.models.llama import Llama, LlamaConfig, Size
from prismatic.models.projector import Projector
from prismatic.models.vision import DINO_ID, SIGLIP_ID, VisionBackbone
from prismatic.ranges import ActionHead, Count, Few, Images

IGNORE = -100  # a label that is not trained on
PATCH_SIZE = 14  # pixels, of both published towers


@dataclass(frozen=True)
class VLAConfig:
    """Sizes of everything; the defaults are openvla-7b. Field names are config.json's where it has them."""

    image_size: int = 224  # pixels a side
    num_images_in_input: Images = 1  # 2 adds the wrist camera (OpenVLA-OFT's name)
    # how hidden states become actions: token by token (OpenVLA), all tokens of a chunk in one forward pass, or regressed (OpenVLA-OFT)
    action_head: ActionHead = "tokens"
    num_actions_chunk: Few = 1  # actions that one query answers with: 8 in OpenVLA-OFT's LIBERO recipe
    action_dim: Few = 7  # numbers of one action; a token head takes any number
    proprio_dim: Annotated[int, Meta(ge=0, le=1024)] = 0  # numbers of the robot's state: 0 none, 8 in OFT's recipe
    stop_token: bool = True  # whether the end token stands behind a chunk; some RL recipes leave it out
    timm_model_ids: tuple[str, str] = (DINO_ID, SIGLIP_ID)
    tiny_timm_kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # sizes of small towers, by timm id
    vision_stem: Annotated[tuple[Size, ...], Meta(max_length=8)] = ()  # channels of small towers' convolutional stem
    text_config: LlamaConfig = field(default_factory=LlamaConfig)
    pad_to_multiple_of: Count = 64  # rows that the table has beyond the tokens
    n_action_bins: Annotated[int, Meta(ge=2)] = 256
    bos_token_id: Count = 1
    eos_token_id: Count = 2
    pad_token_id: Count = 32000
    empty_token_id: Count = 29871  # "▁", which stands between the prompt and the action

    def __post_init__(self) -> None:
        if self.num_images_in_input not in (1, 2):
            raise ConfigError(f"num_images_in_input is {self.num_images_in_input}: give 1, or 2 with the wrist camera")
        if self.action_head == "tokens" and (self.num_actions_chunk != 1 or self.proprio_dim):
            raise ConfigError(
                f"action_head tokens answers with one action and reads no state: with num_actions_chunk {self.num_actions_chunk} and "
                f"proprio_dim {self.proprio_dim} give action_head l1 or parallel"
            )

    @property
    def vocab_size(self) -> int:
        """Tokens without filling rows: 32000. The last n_action_bins of them are actions."""
        return self.text_config.vocab_size - self.pad_to_multiple_of

    @property
    def num_patches(self) -> int:
        """Patches of one image: 256."""
        patch = self.tiny_timm_kwargs.get(self.timm_model_ids[0], {}).get("patch_size", PATCH_SIZE)
        return (self.image_size // patch) ** 2

    @property
    def action_positions(self) -> int:
        """Positions of one chunk's numbers: 56."""
        return self.num_actions_chunk * self.action_dim


@dataclass
class VLAOutput:
    """logits: float32, (B, n_images·num_patches + T, rows) with all_logits, else (labels that count, rows), row by row of the batch; None from
    a regression head that wasn't asked. actions: (B, K, D) float32, normalised, of a head that answers with chunks.
    """

    logits: Tensor | None
    loss: Tensor | None = None
    actions: Tensor | None = None


class VLA(nn.Module):
    """`vision_backbone`, `projector`, `language_model`, `action_head`, `proprio_projector`: parameters under the published checkpoints' names."""

    def __init__(self, config: VLAConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = ActionTokenizer(config.vocab_size, config.n_action_bins)
        hidden_size = config.text_config.hidden_size
        self.vision_backbone = VisionBackbone(
            config.timm_model_ids, config.tiny_timm_kwargs, image_size=config.image_size, stem=config.vision_stem
        )
        self.projector = Projector(self.vision_backbone.width, hidden_size)
        self.language_model = Llama(config.text_config, causal=config.action_head == "tokens")
        self.action_head = L1RegressionHead(hidden_size, config.action_dim) if config.action_head == "l1" else None
        self.proprio_projector = ProprioProjector(config.proprio_dim, hidden_size) if config.proprio_dim else None

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks that run, in their order: of the towers, then of the decoder. What is sharded or recomputed piece by piece."""
        yield from self.vision_backbone.blocks()
        yield from self.language_model.model.layers

    def embed(
        self, input_ids: Tensor, pixel_values: Tensor, proprio: Tensor | None = None, is_blank: Tensor | None = None
    ) -> Tensor:
        """(B, T) ids, (B, 6·n_images, S, S) pixels, (B, proprio_dim) state → (B, P + T, H): BOS, patches, the state's token, the other tokens.

        is_blank (B, T): tokens that are embedded as zeros.
        """
        tokens = self.language_model.model.embed_tokens(input_ids)
        if is_blank is not None:
            tokens = tokens.masked_fill(is_blank[..., None], 0)
        patches = self.projector(self.vision_backbone(pixel_values.to(tokens.dtype)))
        parts = [tokens[:, :1], patches]
        if self.proprio_projector is not None:
            if proprio is None:
                raise ConfigError(f"this model reads a robot state of {self.config.proprio_dim} numbers: give proprio")
            parts.append(self.proprio_projector(proprio))
        return torch.cat([part.to(tokens.dtype) for part in (*parts, tokens[:, 1:])], dim=1)

    def hidden_states(self, embeddings: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, P + T, H) → the same after the final norm. attention_mask (B, T) bool, False at right padding; a causal model needs none."""
        attn_mask = None
        if attention_mask is not None and self.config.action_head != "tokens":
            patches = embeddings.shape[1] - attention_mask.shape[1]
            attn_mask = F.pad(attention_mask.bool(), (patches, 0), value=True)[:, None, None]  # (B, 1, 1, P + T)
        positions = torch.arange(embeddings.shape[1], device=embeddings.device).expand(embeddings.shape[:2])
        return self.language_model(embeddings, positions, attn_mask=attn_mask)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        all_logits: bool = False,
        *,
        actions: Tensor | None = None,
        proprio: Tensor | None = None,
    ) -> VLAOutput:
        """One forward pass over a right-padded batch in training form: the ids end with those of the actions and the end token.

        Loss: mean cross entropy over the labels of the batch that are not -100, each predicted from the position before it; of a regression
        head the mean |difference| to actions (B, K, D). attention_mask (B, T): see hidden_states.
        """
        is_blank = None if labels is None or self.config.action_head == "tokens" else self._is_action(labels)
        hidden = self.hidden_states(self.embed(input_ids, pixel_values, proprio, is_blank), attention_mask)
        logits = self.language_model.lm_head(hidden).float() if all_logits or labels is None else None
        if labels is None:
            return VLAOutput(logits)
        if self.action_head is not None and is_blank is not None:
            predicted = self.action_head(before_blanks(hidden, is_blank, self.config.action_positions))
            return VLAOutput(logits, None if actions is None else F.l1_loss(predicted, actions.float()), predicted)
        targets = labels[:, 1:]
        counts = targets != IGNORE
        targets = targets[counts]  # each is predicted from the position before it
        chosen = self.language_model.lm_head(hidden[:, -labels.shape[1] : -1][counts]).float()
        loss = F.cross_entropy(chosen, targets)
        predicted = None
        if is_blank is not None:
            predicted = self.chunks(bin_centers(chosen.argmax(dim=-1)[self._is_action(targets)], self.tokenizer))
        return VLAOutput(logits if all_logits else chosen, loss, predicted)

    @torch.inference_mode()
    def generate_action_ids(
        self, input_ids: Tensor, pixel_values: Tensor, action_dim: int = 7, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Greedy over the action ids: (B, T) right-padded prompts → (B, action_dim) int64. See decode.py."""
        return ActionDecoder(self)(input_ids, pixel_values, action_dim, attention_mask).ids

    @torch.inference_mode()
    def predict_chunk(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        proprio: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T) right-padded prompts, attention_mask None for full rows → (B, K, D) float32, normalised, in one forward pass."""
        answer, *_ = ActionDecoder(self).chunk(input_ids, pixel_values, proprio, attention_mask)
        return answer if self.action_head is not None else bin_centers(answer, self.tokenizer)

    def before_actions(
        self, input_ids: Tensor, lengths: Tensor, pixel_values: Tensor, proprio: Tensor | None, masked: bool
    ) -> Tensor:
        """Hidden states (B, K·D, H) that the actions of prompts (B, T) of `lengths` tokens, the empty one last, are predicted from.

        Waits for nothing on the device. masked False: every prompt has T tokens.
        """
        end, blanks = self.config.eos_token_id if self.config.stop_token else None, self.config.action_positions
        ids, mask, is_blank = with_blanks(input_ids, lengths, blanks=blanks, end=end, pad=self.config.pad_token_id)
        hidden = self.hidden_states(self.embed(ids, pixel_values, proprio, is_blank), mask if masked else None)
        return before_blanks(hidden, is_blank, blanks)

    def answer(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, K·D, H) → what the head says (B, K, D), action ids or normalised numbers; margins (B, K·D), of numbers inf."""
        if self.action_head is not None:
            return self.action_head(hidden), torch.full(hidden.shape[:2], torch.inf, device=hidden.device)
        ids, margins = best_tokens(self, hidden)
        return self.chunks(ids), margins

    def _is_action(self, ids: Tensor) -> Tensor:
        return (ids >= self.tokenizer.first_id) & (ids < self.config.vocab_size)

    def chunks(self, values: Tensor) -> Tensor:
        """(B·K·D,) values of a batch's actions, or in any such shape → (B, K, D)."""
        return values.reshape(-1, self.config.num_actions_chunk, self.config.action_dim)
