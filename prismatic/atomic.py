"""Files and folders that are replaced at once: whoever reads or interrupts sees the old one or the new one, never half of it, nor one that
a power cut empties: the content is on the disk before its name is.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from prismatic.errors import ConfigError
from prismatic.filenames import UNFINISHED


@contextlib.contextmanager
def writing_to(place: Path, instead: str = "another folder") -> Iterator[None]:
    """Turn what the disk refuses (no space, no permission) into a ConfigError; any other error stays what it is. instead: the way out."""
    try:
        yield
    except Exception as error:
        # safetensors and torch have their own errors for a full disk
        full = "No space left" in str(error) or "SafetensorError" in type(error).__name__
        if isinstance(error, ConfigError) or not (full or isinstance(error, OSError)):
            raise
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        said = f"cannot write {place} ({reason}): make room, or give {instead}"
        raise ConfigError(said) from error


def lock(file: IO[Any], held: str) -> None:
    """Lock an open file until it is closed; ConfigError with the sentence where another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(held) from None


def write_json(path: Path, content: Any) -> None:
    """Indented, for people; what is no Unicode, such as a byte in a command line, as "?". ConfigError when it cannot be written."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="replace"))


def write_whole(path: Path, content: bytes) -> None:
    """ConfigError when it cannot be written, for instance because the disk is full; what was there stays."""
    temporary = path.with_name(f"{UNFINISHED}{path.name}.{os.getpid()}")
    with writing_to(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends well and vanishes when it doesn't.

    For one process at a time: what another call for this folder has begun is deleted, as that one was killed.
    """
    partial, previous = folder.with_name(f"{UNFINISHED}{folder.name}"), folder.with_name(f".previous-{folder.name}")
    with writing_to(folder):
        try:
            _settle(folder, previous)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for path in (*partial.rglob("*"), partial):
                flush(path)
            if folder.exists():
                folder.rename(previous)
            partial.rename(folder)
        finally:
            _settle(folder, previous)
            shutil.rmtree(partial, ignore_errors=True)


def _settle(folder: Path, previous: Path) -> None:
    """Put the old folder back where its successor did not come, else delete it."""
    if previous.exists() and not folder.exists():
        previous.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def sweep(folder: Path, names: str = "*") -> None:
    """Delete what killed calls were writing in a folder, for whoever has it (or what is called so in it) to itself."""
    for left in folder.glob(f"{UNFINISHED}{names}"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif not Path("/proc", left.suffix[1:] or "none").is_dir():  # write_whole's, which end in the writer's number
            left.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, line: bytes) -> None:
    """Add a line (without its newline) that is safe on disk when this returns. ConfigError when it cannot be written."""
    line += b"\n"
    with writing_to(path), path.open("ab", buffering=0) as file:
        if file.write(line) != len(line):
            raise OSError("the disk is full")
        os.fsync(file.fileno())
