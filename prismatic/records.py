"""JSON files into typed records, in one way everywhere: a dataclass, TypedDict or dict[str, …] whose fields carry their limits (ranges.py).

A folder is data from anywhere: what is read is a regular file of bounded size, and whatever it holds gives a record or one ConfigError that
names file and field. Fields that a record doesn't know are passed over, so that a later version's files stay readable.
"""

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from prismatic.errors import ConfigError
from prismatic.ranges import wanted

Record = TypeVar("Record")
LARGEST = 64 << 20  # bytes of a JSON file; the largest known, OpenVLA's statistics of all its data sets, have 0.2 MB
LARGEST_LINES = 1 << 30  # bytes of a file of one record a line: a million episodes
LFS_POINTER = b"version https://git-lfs"
COPY_AGAIN = "copy it again from where the folder came from"


def read_record(path: Path, kind: type[Record], *, way_out: str = COPY_AGAIN) -> Record:
    """The record that a JSON file holds. ConfigError, which ends in `way_out`, for a file that is missing, no regular one, too
    large, no JSON, nested too deep, or has a field of another type or outside its limits; NaN and infinity are no JSON.
    """
    return parse_record(read_bytes(path, way_out=way_out), kind, str(path), way_out=way_out)


def parse_record(content: bytes | str, kind: type[Record], where: str, *, way_out: str = COPY_AGAIN) -> Record:
    """As read_record, of text that is there already, such as a line of a file; `where` names it in errors."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise _field_error(error, where, way_out) from None
    except RecursionError:
        raise ConfigError(f"{where} is nested too deep: {way_out}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is not valid JSON ({_reason(content, error)}): {way_out}") from None


def read_object(path: Path, *, way_out: str = COPY_AGAIN) -> dict[str, Any]:
    """As read_record, of a file whose fields are read one by one later."""
    return read_record(path, dict[str, Any], way_out=way_out)


def fields_of(content: Any, kind: type[Record], where: str, *, way_out: str = COPY_AGAIN) -> Record:
    """As parse_record, of values that are no text any more."""
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise _field_error(error, where, way_out) from None


def read_lines(path: Path, kind: type[Record], *, largest: int = LARGEST_LINES, way_out: str) -> list[Record]:
    """The records of a file of one a line. A last line without its newline is left out where a crash cut it off."""
    *lines, last = read_bytes(path, largest=largest, way_out=way_out).split(b"\n")
    return [
        parse_record(line, kind, f"{path}, line {number}", way_out=way_out)
        for number, line in enumerate([*lines, last] if is_whole(last, kind) else lines, start=1)
        if line.strip()
    ]


def is_whole(line: bytes, kind: type[Record]) -> bool:
    """Whether a line that has no newline is a record all the same, as after an editor."""
    try:
        msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def read_bytes(path: Path, *, largest: int = LARGEST, way_out: str = COPY_AGAIN) -> bytes:
    """The content of a regular file of at most `largest` bytes."""
    with regular_file(path, way_out=way_out) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > largest:
            raise ConfigError(f"{path} has {size} bytes, more than such a file ever has: {way_out}")
        return stream.read(largest)


@contextlib.contextmanager
def regular_file(path: Path, *, way_out: str = COPY_AGAIN) -> Iterator[BufferedReader]:
    """A file, open. ConfigError for what can't be read, for a pipe or a device, which would be waited for for ever, and for a pointer of Git LFS."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{path} is no regular file: {way_out}")
            if stream.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
                raise ConfigError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull` in its folder")
            yield stream
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} can't be read ({reason}): {way_out}") from None


def _field_error(error: msgspec.ValidationError, where: str, way_out: str) -> ConfigError:
    message, _, place = str(error).partition(" - at `$")
    field = re.sub(r"^\.", "", place.rstrip("`")) or "the whole"
    return ConfigError(f"{where}: {field}: {wanted(message)}: {way_out}")


def _reason(content: bytes | str, error: Exception) -> str:
    """What is wrong: Python's reader, which also knows NaN, says it with line and column."""

    def refuse(number: str) -> None:
        raise ValueError(f"it holds {number}, which is no number")

    try:
        json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as better:
        return str(better)
    return str(error)
