"""A name → a folder on this disk. In: a folder, or a hub id such as openvla/openvla-7b. Out: a Path whose files are complete.

Downloads go through huggingface_hub's cache: they resume after an interruption and happen once. Nothing is fetched for a folder that exists.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from prismatic.errors import ConfigError
from prismatic.filenames import ADAPTER_CONFIG, CONFIG, LATEST
from prismatic.ranges import expanded

Kind = Literal["model", "dataset"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# never Python files; heads of OpenVLA-OFT are `action_head--N_checkpoint.pt`
WANTED = ["*.json", "*.safetensors", "*.model", "checkpoints/latest-checkpoint.pt", "*--*_checkpoint.pt"]
WANTED_DATA = ["*.json", "*.tfrecord*", "*.array_record*"]  # of an RLDS data set


def local(name: str | Path, kind: Kind = "model") -> Path | None:
    """The folder that name is; None for a hub id. ConfigError for neither."""
    folder = Path(expanded(name))
    if folder.is_dir():
        return newest_step(folder) if kind == "model" else folder
    is_id = HUB_ID.fullmatch(str(name)) and not str(name).startswith(("./", "../"))
    if is_id and Path(folder.parts[0]).exists():
        there = f"{folder.parts[0]} is here, but nothing named {folder.name} in it"
        raise ConfigError(f"{name}: {there}: for the hub's, start from another folder or rename that one")
    if not is_id:
        what, example = (name, "openvla-7b") if kind == "model" else (f"--data_root_dir {name}", "modified_libero_rlds")
        raise ConfigError(f"{what} is no folder, and no hub id such as openvla/{example}: check the path")
    return None


def resolve(name: str | Path, *, kind: Kind = "model", patterns: Sequence[str] | None = None) -> Path:
    """The folder that name is, or the snapshot of the hub id that it names. ConfigError if it is neither, or can't be fetched.

    patterns: which files to fetch, if not those of a checkpoint.
    """
    if folder := local(name, kind):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), repo_type=kind, allow_patterns=list(patterns or WANTED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{name} is no folder here and can't be fetched from the hub ({first}): give a path, or log in and try again"
        ) from None


def newest_step(folder: Path) -> Path:
    """A training run's folder stands for its newest step; any other folder for itself."""
    is_run = (folder / LATEST).is_dir() and not any((folder / name).exists() for name in (CONFIG, ADAPTER_CONFIG))
    return folder / LATEST if is_run else folder
