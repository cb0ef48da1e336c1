"""What --dataset_name means: data sets by name, each with a weight if it has one, opened as one Mixture."""

from pathlib import Path

from prismatic.data.dataset_folder import find_dataset
from prismatic.data.frames import VAL_SHARE, FrameCache, Mixture
from prismatic.data.rlds import build_cache
from prismatic.errors import ConfigError


def open_mixture(root: Path, dataset_name: str, *, cache_dir: Path, seed: int, val_share: float = VAL_SHARE) -> Mixture:
    """The frame caches of dataset_name (a name, or name:weight,name:weight), built from RLDS where they aren't there yet."""
    caches, shares = [], []
    for part in dataset_name.split(","):
        name, _, share = part.strip().partition(":")
        try:
            shares.append(float(share or 1.0))
        except ValueError:
            raise ConfigError(
                f"--dataset_name {part!r}: {share!r} is no weight, write it like libero_spatial_no_noops:0.5"
            ) from None
        caches.append(FrameCache(build_cache(find_dataset(root, name), cache_dir)))
    return Mixture(caches, seed=seed, weights=shares, val_share=val_share)
