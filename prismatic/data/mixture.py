"""What --dataset_name means: a data set by name, or several, each with a weight if it has one, opened as one Mixture, whatever their formats."""

import functools
import glob
from pathlib import Path
from typing import Any

from prismatic.data import lerobot, rlds
from prismatic.data.dataset_folder import find_dataset, is_lerobot, is_version
from prismatic.data.frames import LARGEST_WEIGHT, VAL_SHARE, FrameCache, Mixture
from prismatic.data.gripper import choose_gripper
from prismatic.errors import ConfigError
from prismatic.filenames import RLDS_INFO
from prismatic.hub import WANTED_DATA, resolve
from prismatic.ranges import check_folder_name


def open_cache(
    root: str | Path,
    name: str,
    *,
    cache_dir: Path,
    data_keys: str = "",
    gripper: str = "auto",
    rotate_images: bool = False,
) -> FrameCache:
    """The frame cache of one data set, RLDS or LeRobot, built where it isn't there yet.

    root: a folder of data sets, or the hub id of such a folder or of one LeRobot data set. data_keys: which fields are meant, see keys.py.
    gripper: a convention of normalize.GRIPPER_CONVENTIONS, "none", or "auto" to find it. rotate_images: turn each image by 180°.
    """
    name = name.rstrip("/")
    title = Path(name).name  # a cache or a page is never outside its folder
    if title:
        check_folder_name(title, "--dataset_name")
    options = {"data_keys": data_keys, "rotate_images": rotate_images}
    source = None
    if not Path(root).expanduser().is_dir():
        source = lerobot.fetch(str(root), data_keys)
        if source and name != str(root).rpartition("/")[2]:
            raise ConfigError(f"{root} is one LeRobot data set: give --dataset_name {str(root).rpartition('/')[2]}")
        source = source or _of_hub(str(root), name)
    source = source or find_dataset(Path(root), name)
    build = functools.partial(lerobot.build_cache, name=title) if is_lerobot(source) else rlds.build_cache
    folder = build(source, cache_dir, **options)
    cache = FrameCache(folder)
    chosen = choose_gripper(gripper, cache.gripper, cache.actions.shape[1])
    return cache if chosen == cache.gripper else FrameCache(folder, chosen)


def _of_hub(repo_id: str, name: str) -> Path:
    """One of a repository's RLDS data sets, without the others' gigabytes: their small descriptions say which there are."""
    snapshot = resolve(repo_id, kind="dataset", patterns=[f"*/{RLDS_INFO}"]).absolute()
    infos = [info for info in snapshot.rglob(f"*/*/{RLDS_INFO}") if is_version(info.parent.name)]
    there = sorted({info.parents[1].relative_to(snapshot).as_posix() for info in infos})
    meant = [name] if name in there else [place for place in there if Path(place).name == name]
    if len(meant) != 1:
        names = f"--dataset_name {' | '.join(there)}" if there else "a folder of data sets into which you download it"
        raise ConfigError(f"--data_root_dir {repo_id} holds no folder of an RLDS data set {name[:80]!r}: give {names}")
    version = find_dataset(snapshot, meant[0]).relative_to(snapshot)
    patterns = [f"{glob.escape(str(version))}/{files}" for files in WANTED_DATA]
    return resolve(repo_id, kind="dataset", patterns=patterns).absolute() / version


def open_mixture(
    root: str | Path,
    dataset_name: str,
    *,
    seed: int,
    val_share: float = VAL_SHARE,
    num_actions_chunk: int = 1,
    **how: Any,
) -> Mixture:
    """The frame caches of dataset_name (a name, or name:weight,name:weight), each opened by open_cache, which takes `how`."""
    names, weights = zip(*names_and_weights(dataset_name), strict=True)
    caches = [open_cache(root, name, **how) for name in names]
    return Mixture(caches, seed=seed, weights=weights, val_share=val_share, num_actions_chunk=num_actions_chunk)


def names_and_weights(dataset_name: str) -> list[tuple[str, float]]:
    """Of each data set, 1 where it has no weight. ConfigError for a weight that isn't above 0 and at most 1000."""
    found = []
    for part in dataset_name.split(","):
        name, _, given = part.strip().partition(":")
        try:
            weight = float(given or 1.0)
        except ValueError:
            weight = 0.0
        if not 0 < weight <= LARGEST_WEIGHT:
            said = f"--dataset_name {part!r}: {given!r} is no weight above 0 and at most {LARGEST_WEIGHT}"
            raise ConfigError(f"{said}, write it like libero_spatial_no_noops:0.5")
        found.append((name, weight))
    return found


def sentences(cache: FrameCache, *, rotate_images: bool = False) -> list[str]:
    """What a person should know of how a data set is read, before it costs a day."""
    turned = "as recorded, not turned (they should be upright; --rotate_images True turns them)"
    dims = ", ".join(str(dim) for dim in cache.gripper.dims)
    return [
        f"data set {cache.name}: {len(cache):,} frames, {len(cache.file_paths):,} episodes; " + "; ".join(cache.notes),
        f"images {'turned by 180°' if rotate_images else turned}",
        f"gripper{f' (dimension {dims})' if dims else ''}: {cache.gripper.evidence}",
    ]
