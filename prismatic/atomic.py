"""Files that are replaced at once: whoever reads or interrupts sees the old one or the new one, never half of it."""

import json
import os
from pathlib import Path
from typing import Any

from prismatic.errors import ConfigError


def write_json(path: Path, content: Any) -> None:
    """Indented, for people. ConfigError when it cannot be written."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """ConfigError when it cannot be written, for instance because the disk is full; what was there stays."""
    temporary = path.with_name(f".unfinished-{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise no_room(path, error) from error


def no_room(path: Path, error: OSError) -> ConfigError:
    """The sentence for a file that cannot be written."""
    reason = error.strerror or error
    return ConfigError(f"cannot write {path} ({reason}): make room; the same command then continues")
