"""Data sets as folders and files, looked at without TensorFlow: which there are, of which format, and whether they are whole.

RLDS lies in `<data_root_dir>/<dataset_name>/<version>/` (dataset_info.json, features.json, tfrecord files), LeRobot in
`<data_root_dir>/<dataset_name>/` (meta/info.json, data/, videos/).
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NotRequired, TypedDict

from prismatic.errors import ConfigError
from prismatic.filenames import LEROBOT_INFO, RLDS_FEATURES, RLDS_INFO
from prismatic.ranges import Count
from prismatic.records import read_object, read_record, regular_file

AGAIN = "download or collect the data set again"
RECORD_HEADER_BYTES = 12  # of a tfrecord: the content's length in 8 bytes, and their checksum
RECORD_FOOTER_BYTES = 4  # the content's checksum


# Of dataset_info.json, what is counted with: the episodes of each file; tfds writes 64-bit numbers as texts.
class _Split(TypedDict):
    shardLengths: list[Count | str]
    filepathTemplate: NotRequired[str | None]


class _Info(TypedDict):
    splits: list[_Split]


def find_dataset(data_root_dir: Path, dataset_name: str) -> Path:
    """`<data_root_dir>/<dataset_name>` where that is a LeRobot data set, or its newest version where it is RLDS.

    A root that is one level off, the data set itself or the folder above its root, is taken where that leaves no doubt.
    ConfigError lists what there is.
    """
    root = Path(data_root_dir).expanduser().absolute()
    if not root.is_dir():
        raise ConfigError(f"data_root_dir {root} doesn't exist: give the folder that holds {dataset_name}/")
    if os.path.isdir(asked := root / dataset_name) and not os.access(asked, os.R_OK | os.X_OK):
        raise ConfigError(f"{asked} may not be looked at: run as a user who may read it")
    if found := _dataset_in(asked):
        return found
    near = {folder: found for folder in [root, *root.glob("*"), *root.glob("*/*")] if (found := _dataset_in(folder))}
    meant = [folder for folder in near if folder.name == dataset_name]
    if root in meant or len(meant) == 1:
        return near[meant[0]]
    there: dict[Path, list[str]] = {}
    for folder in sorted(near):
        there.setdefault(folder.parent, []).append(folder.name)
    flags = [f"--data_root_dir {parent} --dataset_name {' | '.join(names)}" for parent, names in there.items()]
    said = f"data_root_dir {root} holds no data set {dataset_name[:80]!r}, neither RLDS nor LeRobot"
    raise ConfigError(f"{said}: give {'; or '.join(flags) or 'the folder of one'}")


def _dataset_in(folder: Path) -> Path | None:
    """The folder if it is a LeRobot data set, its newest version if it is an RLDS one, else None."""
    if not os.path.isdir(folder):  # not there, not to be looked at, or of a name that is too long
        return None
    if is_lerobot(folder):
        return folder
    versions = [info.parent for info in folder.glob(f"*/{RLDS_INFO}") if is_version(info.parent.name)]
    return max(versions, key=lambda version: [int(part) for part in version.name.split(".")], default=None)


def is_lerobot(folder: Path) -> bool:
    """Whether it has a LeRobot data set's description."""
    return os.path.isfile(folder / LEROBOT_INFO)  # False, too, where it may not be looked at


def dataset_name(source: Path) -> str:
    """The name under which a version folder's statistics are kept: its parent's."""
    return source.parent.name if is_version(source.name) else source.name


def listing(files: Iterable[Path]) -> list[list[str | int]]:
    """Name, bytes, time of change (ns) of each: differs when a file does, without reading 10 GB. ConfigError for a dangling link."""
    files = sorted(files)
    for file in files:
        if not file.exists():
            raise ConfigError(f"{file} is a link that leads nowhere: fetch what it stands for, or {AGAIN}")
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def check_whole(source: Path) -> None:
    """ConfigError unless this version folder has its two JSON files and all its episodes, none cut off.

    Walks the tfrecords from header to header, some hundred small reads, so that the bad file is named.
    """
    for name in (RLDS_INFO, RLDS_FEATURES):
        if not (source / name).exists():
            raise ConfigError(f"{source} is no RLDS data set, as it has no {name}: give a version folder")
    info = read_record(source / RLDS_INFO, _Info, way_out=AGAIN)
    read_object(source / RLDS_FEATURES, way_out=AGAIN)
    try:
        expected = sum(int(length) for split in info["splits"] for length in split["shardLengths"])
    except ValueError:
        raise ConfigError(f"{source / RLDS_INFO}: splits: a shard's length is no number: {AGAIN}") from None
    if any(set(split.get("filepathTemplate") or "") & {"/", "\\"} for split in info["splits"]):
        raise ConfigError(f"{source / RLDS_INFO}: splits: filepathTemplate names files outside this folder: {AGAIN}")
    found, shards = 0, len([*source.glob("*.array_record*")])
    if shards and shards == sum(len(split["shardLengths"]) for split in info["splits"]):
        return  # of this kind no more is known without its library
    for path in sorted(source.glob("*.tfrecord*")):
        size, position = path.stat().st_size, 0
        with regular_file(path, way_out=AGAIN) as file:
            while position < size:
                file.seek(position)
                length = int.from_bytes(file.read(RECORD_HEADER_BYTES)[:8], "little")
                position += RECORD_HEADER_BYTES + length + RECORD_FOOTER_BYTES
                if position > size:
                    raise ConfigError(f"{path} is cut off in its last episode: {AGAIN}")
                found += 1
    if found != expected or found == 0:
        raise ConfigError(f"{source} has {found} of the {expected} episodes that it should have: {AGAIN}")


def is_version(name: str) -> bool:
    """Whether a folder's name is that of an RLDS data set's version."""
    return re.fullmatch(r"\d+\.\d+\.\d+", name) is not None
