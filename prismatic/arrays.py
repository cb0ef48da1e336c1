"""Arrays of an .npz file, whose size is looked at before anything of it is made."""

import zipfile
from pathlib import Path

import numpy as np

SMALL = 64 << 20  # bytes that any file may unpack to,
LARGEST_RATIO = 50  # and a larger one this many times its own size: recorded numbers shrink to a tenth at best


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Name → array. ValueError where the file is no regular one, or unpacks to far more than it has.

    What zipfile, zlib and numpy raise for damaged files, such as one whose header claims 20 GB, they raise here.
    """
    if not path.is_file():
        raise ValueError("it is missing, or no regular file")
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > max(SMALL, LARGEST_RATIO * path.stat().st_size):
            raise ValueError("it unpacks to far more than such numbers do")
        if damaged := archive.testzip():  # numpy stops where a header says, before a member's checksum
            raise ValueError(f"{damaged} has another checksum than it should")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except MemoryError as error:
        raise ValueError(f"an array claims more than there is memory ({error})") from None
