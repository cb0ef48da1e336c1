"""SHA256SUMS of a folder, in the form that `sha256sum -c` reads: written when the folder is whole, compared when its files are loaded."""

import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from prismatic.errors import ConfigError
from prismatic.filenames import SUMS
from prismatic.records import read_bytes, regular_file

LARGEST = 1 << 20  # bytes of a SHA256SUMS
LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](\./)?(?P<name>.+)")  # " " of a text, "*" of a binary file


def write_sums(folder: Path, files: Iterable[Path]) -> None:
    """Add the sums of these files, which lie in folder."""
    (folder / SUMS).write_text("".join(f"{sha256(file)}  {file.name}\n" for file in sorted(files)))


def read_sums(folder: Path) -> dict[str, str]:
    """Digest by file name. ConfigError for a list that is cut off or unreadable."""
    content = read_bytes(folder / SUMS, largest=LARGEST, way_out="copy the folder again").decode(errors="replace")
    lines = [LINE.fullmatch(line) for line in content.splitlines()]
    if None in lines:
        raise ConfigError(f"{folder / SUMS} is cut off or damaged: copy the folder again")
    return {line["name"]: line["digest"].lower() for line in lines if line}


def check_sum(path: Path) -> None:
    """ConfigError for a file that is not as its folder's SHA256SUMS says; nothing where there is none, or it doesn't name the file."""
    if (path.parent / SUMS).is_file() and path.is_file():
        found = path.stat()
        _check(path, found.st_size, found.st_mtime_ns, (path.parent / SUMS).stat().st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _check(path: Path, size: int, changed: int, sums_changed: int) -> None:
    """Once a version of a file: a policy's weights are opened several times while it loads."""
    digest = read_sums(path.parent).get(path.name)
    if digest is not None and digest != sha256(path):
        raise ConfigError(
            f"{path} is not as it was written: copy it again, or delete {SUMS} beside it if you changed it yourself"
        )


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with regular_file(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
