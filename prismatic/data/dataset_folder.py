"""RLDS data sets as folders and files, looked at without TensorFlow: which there are, and whether they are
whole.

The layout is `<data_root_dir>/<dataset_name>/<version>/`, with dataset_info.json, features.json, tfrecord
files.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from prismatic.errors import ConfigError

AGAIN = "download or collect the data set again"
RECORD_HEADER_BYTES = 12  # of a tfrecord: the content's length in 8 bytes, and their checksum
RECORD_FOOTER_BYTES = 4  # the content's checksum


def find_dataset(data_root_dir: Path, dataset_name: str) -> Path:
    """The newest `<data_root_dir>/<dataset_name>/<version>`; ConfigError lists what there is."""
    root = Path(data_root_dir)
    if not root.is_dir():
        raise ConfigError(f"data_root_dir {root} doesn't exist: give the folder that holds {dataset_name}/")
    version = _newest_version(root / dataset_name)
    if version is None:
        there = ", ".join(sorted(folder.name for folder in root.iterdir() if _newest_version(folder)))
        raise ConfigError(
            f"data_root_dir {root} holds no RLDS data set {dataset_name!r}: "
            + (f"set dataset_name to one that it holds ({there})" if there else "nor any other")
        )
    return version


def dataset_name(source: Path) -> str:
    """The name under which a version folder's statistics are kept: its parent's."""
    return source.parent.name if _is_version(source.name) else source.name


def listing(files: Iterable[Path]) -> list[list[str | int]]:
    """Name, bytes, time of change (ns) of each: differs when a file does, without reading 10 GB."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]


def check_whole(source: Path) -> None:
    """ConfigError unless this version folder has its two JSON files and all its episodes, none cut off.

    Walks the tfrecords from header to header, some hundred small reads, so that the bad file is named.
    """
    try:
        info = json.loads((source / "dataset_info.json").read_text())
        expected = sum(int(length) for split in info["splits"] for length in split["shardLengths"])
        json.loads((source / "features.json").read_text())
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise ConfigError(f"{source} is no RLDS data set, as it has no {missing}: give a version folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the JSON files of {source} are damaged ({error!r}): {AGAIN}") from None
    found = 0
    for path in sorted(source.glob("*.tfrecord*")):
        size, position = path.stat().st_size, 0
        with path.open("rb") as file:
            while position < size:
                file.seek(position)
                length = int.from_bytes(file.read(RECORD_HEADER_BYTES)[:8], "little")
                position += RECORD_HEADER_BYTES + length + RECORD_FOOTER_BYTES
                if position > size:
                    raise ConfigError(f"{path} is cut off in its last episode: {AGAIN}")
                found += 1
    if found != expected or found == 0:
        raise ConfigError(f"{source} has {found} of the {expected} episodes that it should have: {AGAIN}")


def _newest_version(dataset: Path) -> Path | None:
    versions = [info.parent for info in dataset.glob("*/dataset_info.json") if _is_version(info.parent.name)]
    return max(versions, key=lambda folder: [int(part) for part in folder.name.split(".")], default=None)


def _is_version(name: str) -> bool:
    return re.fullmatch(r"\d+\.\d+\.\d+", name) is not None
