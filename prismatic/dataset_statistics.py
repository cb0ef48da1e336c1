"""Statistics of data sets, from dataset_statistics.json or `norm_stats` of config.json: looked at for sense before anybody acts or trains by them.

Of a file with many entries only the chosen one must make sense. Surprising: an entry without a mask scales all dimensions, the gripper too, as
the original does; that is said. A file of one data set, as OpenVLA's data loader caches it, has no key on top: it is taken under `unnorm_key`.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from msgspec import Meta

from prismatic.errors import ConfigError
from prismatic.filenames import CONFIG, STATISTICS
from prismatic.ranges import Count
from prismatic.records import fields_of, read_object

NO_NOOPS = "_no_noops"  # ends a data set's name without its still steps: the statistics of either serve a suite's name
COPY = "copy the statistics from the run that made the weights"
# In metres, radians or normalised units nothing is larger than this by far.
Column = Annotated[list[Annotated[float, Meta(ge=-1e5, le=1e5)]], Meta(min_length=1, max_length=256)]


class _Columns(TypedDict, total=False):
    """A number a dimension, D in each list."""

    mean: Column
    std: Column
    max: Column
    min: Column
    q01: Column
    q99: Column
    mask: list[bool]


class _Entry(TypedDict, total=False):
    action: _Columns
    proprio: _Columns
    num_transitions: Count
    num_trajectories: Count


def load_statistics(folder: Path, unnorm_key: str | None = None, *, needed: bool = True) -> dict[str, Any]:
    """All entries of a folder's statistics: dataset_statistics.json, else `norm_stats` of config.json. Where there are none, as in a base model,
    ConfigError if they are needed, else {}.
    """
    if os.path.lexists(folder / STATISTICS):  # a link that leads nowhere is no leave to read others
        return read_statistics(folder / STATISTICS, unnorm_key)
    found = read_object(folder / CONFIG).get("norm_stats") if (folder / CONFIG).exists() else None
    if not found and not needed:
        return {}
    if not found:
        raise ConfigError(
            f"{folder} has no {STATISTICS} (and no norm_stats in {CONFIG}): copy it from the run that made the weights"
        )
    return _entries(found, f"{folder / CONFIG}, norm_stats", unnorm_key)


def read_statistics(path: Path, unnorm_key: str | None = None) -> dict[str, Any]:
    """The entries of a statistics file by data set; unnorm_key names the one entry of a file that has no key on top."""
    return _entries(read_object(path, way_out=COPY), str(path), unnorm_key)


def _entries(found: Any, where: str, unnorm_key: str | None) -> dict[str, Any]:
    if isinstance(found, dict) and isinstance(found.get("action"), dict) and "action" not in found["action"]:
        return {unnorm_key or "dataset": found}
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise ConfigError(f"{where} holds no object of an entry a data set: {COPY}")
    return found


def statistics_key(statistics: Mapping[str, Any], unnorm_key: str | None, folder: Path) -> str:
    """The entry that unnorm_key means: itself, or with `_no_noops`; the only one if None. ConfigError that lists the keys otherwise."""
    if unnorm_key is None and len(statistics) == 1:
        return next(iter(statistics))
    for key in (unnorm_key, f"{unnorm_key}{NO_NOOPS}", str(unnorm_key).removesuffix(NO_NOOPS)):
        if key in statistics:
            return str(key)
    asked = "--unnorm_key is needed" if unnorm_key is None else f"--unnorm_key {unnorm_key} is not there"
    raise ConfigError(f"{asked}: {folder} has statistics of {', '.join(sorted(statistics)) or 'no data set'}")


def check_entry(entry: Any, where: str, *, state: bool = False, whole: bool = False, way_out: str = COPY) -> None:
    """ConfigError that names the field unless an entry makes sense: finite numbers of one length, q01 up to q99, a mask that fits.

    state: the robot's state is read too, so `proprio` is needed. whole: training needs min and max as well. way_out: ends each sentence.
    """
    found = fields_of(entry, _Entry, where, way_out=way_out)
    for part in ("action", "proprio") if state else ("action",):
        for complaint in _complaints(part, found.get(part, {}), whole=whole):
            raise ConfigError(f"{where}: {part}.{complaint}: {way_out}")
    if "mask" not in entry["action"]:
        print(f"notice: {where} has no action.mask: every dimension is scaled, the gripper too", file=sys.stderr)


def _complaints(part: str, columns: Mapping[str, Any], *, whole: bool) -> Iterator[str]:
    """What makes no sense in a part of an entry. Each relies on those before it."""
    # what never changes is told by its range
    for name in ("q01", "q99", "min", "max") if whole or part == "proprio" else ("q01", "q99"):
        if name not in columns:
            yield f"{name} is missing"
    size = len(columns["q01"])
    for name, column in columns.items():
        if len(column) != size:
            yield f"{name} has {len(column)} values, but q01 has {size}"
    for low, high in (("q01", "q99"), ("min", "max")):
        if low in columns and high in columns and np.greater(columns[low], columns[high]).any():
            yield f"{low} is above {high} in a dimension"
    if min(columns.get("std", [0.0])) < 0:
        yield "std has a negative value"
    if part == "action" and not any(columns.get("mask", [True])):
        yield "mask is false everywhere, so no dimension would be scaled"
    if part == "action" and np.equal(columns["q01"], columns["q99"]).all():
        yield "q01 equals q99 in every dimension, so nothing would move"
