"""The two image towers, DINOv2 and SigLIP, built by timm. In: pixel_values (B, 6, S, S). Out: patch features (B, N, D_dino + D_siglip).

Surprising: features come out of the *second-to-last* block without the final norm, so the last block never runs (its weights stay, because
the published checkpoint has them); both towers use exact (erf) GELU, whatever today's timm defaults to; LayerScale is called `scale_factor`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

DINO_ID, SIGLIP_ID = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
CHANNELS = 3  # of one image; each tower sees it normalised its own way


class LayerScale(nn.Module):
    """Per-channel scale under the published checkpoint's name; timm calls the same tensor `gamma`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class ConvStem(nn.Module):
    """Small convolutions in place of one large patch convolution: what lets a small tower learn from few images.

    Each of `channels` halves the image; `proj` does the rest of the patch. Named after timm's patch embedding, so LoRA adapts `proj` here too.
    """

    def __init__(self, channels: Sequence[int], patch_size: int, width: int) -> None:
        super().__init__()
        remaining, rest = divmod(patch_size, 2 ** len(channels))
        if rest or remaining < 1:
            raise ValueError(f"a stem of {len(channels)} halvings does not divide patches of {patch_size} pixels")
        layers: list[nn.Module] = []
        for c_in, c_out in zip((CHANNELS, *channels), channels, strict=False):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GELU()]
        self.convs = nn.Sequential(*layers)
        self.proj = nn.Conv2d(channels[-1], width, remaining, stride=remaining)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, N, width)."""
        return self.proj(self.convs(x)).flatten(2).transpose(1, 2)


def build_tower(timm_id: str, *, image_size: int, stem: Sequence[int] = (), **timm_kwargs: Any) -> Any:
    """One timm VisionTransformer with random weights, under the published names. timm_kwargs: sizes of a small tower (embed_dim, depth, …)."""
    tower: Any = timm.create_model(
        timm_id, pretrained=False, num_classes=0, img_size=image_size, act_layer=nn.GELU, **timm_kwargs
    )
    for block in tower.blocks:
        for name in ("ls1", "ls2"):
            if hasattr(getattr(block, name), "gamma"):
                setattr(block, name, LayerScale(tower.embed_dim))
    if stem:
        tower.patch_embed = ConvStem(stem, tower.patch_embed.patch_size[0], tower.embed_dim)
    return tower


def patch_features(tower: Any, pixels: Tensor) -> Tensor:
    """(B, 3, S, S) → (B, N, D): output of the second-to-last block, prefix tokens (cls, registers) dropped."""
    x = tower._pos_embed(tower.patch_embed(pixels))
    for block in tower.blocks[:-1]:
        x = block(x)
    return x[:, tower.num_prefix_tokens :]


class VisionBackbone(nn.Module):
    """`featurizer` (DINOv2) and `fused_featurizer` (SigLIP) side by side over every image of the input."""

    def __init__(
        self,
        timm_ids: Sequence[str],
        timm_kwargs: Mapping[str, Mapping[str, Any]],
        *,
        image_size: int,
        stem: Sequence[int] = (),
    ) -> None:
        super().__init__()
        dino, siglip = timm_ids
        self.featurizer = build_tower(dino, image_size=image_size, stem=stem, **timm_kwargs.get(dino, {}))
        self.fused_featurizer = build_tower(siglip, image_size=image_size, stem=stem, **timm_kwargs.get(siglip, {}))
        self.width: int = self.featurizer.embed_dim + self.fused_featurizer.embed_dim

    def blocks(self) -> Iterator[nn.Module]:
        """The transformer blocks that run."""
        for tower in (self.featurizer, self.fused_featurizer):
            yield from tower.blocks[:-1]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 6·n_images, S, S) → (B, n_images·N, D_dino + D_siglip); per image the DINO channels, then the SigLIP channels."""
        batch = pixel_values.shape[0]
        images = pixel_values.reshape(-1, 2 * CHANNELS, *pixel_values.shape[-2:])  # (B·n_images, 6, S, S)
        dino = patch_features(self.featurizer, images[:, :CHANNELS])
        siglip = patch_features(self.fused_featurizer, images[:, CHANNELS:])
        return torch.cat([dino, siglip], dim=-1).reshape(batch, -1, self.width)
