"""What a training step keeps alive between forward and backward pass, counted block by block on fake tensors: no memory, no card, a second.

In: a VLAConfig, sizes and number formats. Out: bytes. One block of each kind goes through its own forward and backward code, and is
multiplied by how often it stands in the model: the count follows the code, whatever is changed there. What a GPU's autocast keeps more than
a CPU's (the towers' LayerNorms in float32) is left out: counted, it is 2 % of a full-size plan at most.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from prismatic.models.checkpointing import checkpoint_activations, lean_activations
from prismatic.models.llama import rotary
from prismatic.models.lora import add_lora
from prismatic.models.lora_dtype import cast_once, compute_in_base_dtype
from prismatic.models.vision import CHANNELS
from prismatic.models.vla import VLA, VLAConfig
from prismatic.training.live_bytes import LiveBytes
from prismatic.training.step import attention_kernel

SELECTIVE: Literal["selective"] = "selective"
Checkpointing = bool | Literal["selective"]  # recomputed: nothing, all of a block, or what is cheap
BLOCKS = ("dino", "siglip", "layer")
LABELS = 8  # positions a row that have a label: 7 actions and </s>


@dataclass(frozen=True)
class Precision:
    """Number formats of a training run. lora_rank 0: every weight is trained."""

    lora_rank: int = 32
    lora_dropout: float = 0.0
    base_dtype: torch.dtype = torch.bfloat16  # in which the base computes
    lora_dtype: torch.dtype = torch.float32
    autocast: bool = False
    shard_dtype: torch.dtype | None = None  # in which shares of a model are kept that computes in base_dtype (--shard)


SHARDED = Precision(lora_rank=0, shard_dtype=torch.float32)  # what distributed.shard makes of a model on GPUs


@dataclass(frozen=True)
class Piece:
    """Bytes of one block: kept from forward to backward pass, and the most at any moment of the two."""

    saved: int
    peak: int


def fake_vla(config: VLAConfig, precision: Precision, mode: FakeTensorMode) -> VLA:
    """A model of mode's fake tensors, with adapters and number formats as in training."""
    with torch.device("meta"):
        vla = VLA(config)
        if precision.lora_rank:
            add_lora(vla, rank=precision.lora_rank, dropout=precision.lora_dropout)
    for module in vla.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = parameter.requires_grad and precision.lora_rank > 0
            with mode:
                fake = torch.empty(parameter.shape, dtype=precision.lora_dtype if own else precision.base_dtype)
            setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
    if precision.lora_rank and precision.lora_dtype != precision.base_dtype:
        compute_in_base_dtype(vla)
    return lean_activations(vla).train()


def shallow(config: VLAConfig) -> VLAConfig:
    """The same widths with one block of each kind that is run."""
    towers = {name: {**config.tiny_timm_kwargs.get(name, {}), "depth": 2} for name in config.timm_model_ids}
    text = dataclasses.replace(config.text_config, num_hidden_layers=1)
    return dataclasses.replace(config, tiny_timm_kwargs=towers, text_config=text)


def pieces(
    config: VLAConfig, precision: Precision, *, batch_size: int, words: int, on_cpu: bool = False
) -> dict[tuple[str, Checkpointing], Piece]:
    """A Piece of each kind and way of recomputing: "dino", "siglip" (a block), "layer" (of the decoder) in all ways; "dino patches",
    "siglip patches", "projector", "head" (norm, logits, loss), which are never recomputed.
    """
    mode, found = FakeTensorMode(), {}
    for way in (False, SELECTIVE, True):
        vla = fake_vla(shallow(config), precision, mode)
        if way:
            checkpoint_activations(vla, selective=way == SELECTIVE)
        with mode, cast_once(vla), attention_kernel("cpu" if on_cpu else "cuda", precision.autocast):
            for name, run, shape in _runs(vla, batch_size, words):
                if not way or name in BLOCKS:
                    found[name, way] = _measure(run, shape, precision=precision)
    return found


def _runs(
    vla: VLA, batch: int, words: int
) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]]:
    """(name, what is run, shape of its input) of each piece."""
    config, llama = vla.config, vla.language_model
    text = config.text_config
    pictures = batch * config.num_images_in_input
    for name, tower in (("dino", vla.vision_backbone.featurizer), ("siglip", vla.vision_backbone.fused_featurizer)):
        yield f"{name} patches", tower.patch_embed, (pictures, CHANNELS, config.image_size, config.image_size)
        yield name, tower.blocks[0], (pictures, config.num_patches + tower.num_prefix_tokens, tower.embed_dim)
    patches = config.num_patches * config.num_images_in_input
    yield "projector", vla.projector, (batch, patches, vla.vision_backbone.width)
    length = patches + words + (config.proprio_dim > 0)
    norm, positions = llama.model.norm.weight, torch.arange(length).expand(batch, -1)
    # all layers'
    cos_sin = rotary(positions, text.hidden_size // text.num_attention_heads, text.rope_theta, norm.dtype)
    chunked = config.action_head != "tokens"
    attn_mask = torch.ones(batch, 1, 1, length, dtype=torch.bool) if chunked else None
    labels = 1 + config.action_positions  # the end token's too

    def layer(x: torch.Tensor) -> torch.Tensor:
        return llama.model.layers[0](x, cos_sin, None, attn_mask)

    def head(x: torch.Tensor) -> torch.Tensor:
        hidden = llama.model.norm(x)
        if vla.action_head is not None:
            predicted = vla.action_head(hidden[:, -labels:-1].contiguous())
            return F.l1_loss(predicted, torch.zeros_like(predicted))
        chosen = llama.lm_head(hidden[:, -labels:].flatten(0, 1)).float()
        return F.cross_entropy(chosen, torch.zeros(chosen.shape[0], dtype=torch.long))

    yield "layer", layer, (batch, length, text.hidden_size)
    yield "head", head, (batch, length, text.hidden_size)


def _measure(run: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], *, precision: Precision) -> Piece:
    leaf = torch.empty(shape, dtype=precision.base_dtype, requires_grad=shape[1] != CHANNELS)  # pixels need none

    def there_and_back() -> Piece:
        with LiveBytes() as live:
            x = leaf.clone()  # freed where no backward pass needs it
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision.autocast, cache_enabled=False):
                out = run(x)
            del x
            saved = live.now - out.nbytes
            gradient, edge = torch.empty_like(out), torch.autograd.graph.get_gradient_edge(out)
            del out  # the next block's input: counted there
            torch.autograd.backward(edge, gradient)
        return Piece(saved, live.peak)

    there_and_back()  # makes the gradients, which have a line of their own
    return there_and_back()
