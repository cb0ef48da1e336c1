"""Arrays of an .npz file, whose claims are looked at before anything of their size is made."""

import math
import zipfile
from pathlib import Path

import numpy as np

SMALL = 64 << 20  # bytes that any file may unpack to,
LARGEST_RATIO = 50  # and a larger one this many times its own size: recorded numbers shrink to a tenth at best
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Name → array. ValueError where one claims another size than the file holds for it, or the file is no regular one.

    What zipfile, zlib and numpy raise for damaged files they raise here: a file of 0.3 MB that claims 20 GB is the one that they allow.
    """
    if not path.is_file():
        raise ValueError("it is missing, or no regular file")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > max(SMALL, LARGEST_RATIO * path.stat().st_size):
            raise ValueError("it unpacks to far more than such numbers do")
        for member in members:
            with archive.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                if version not in HEADERS:
                    raise ValueError(f"{member.filename} has format {version}")
                shape, _, dtype = HEADERS[version](stream)
                if math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
                    raise ValueError(f"{member.filename} claims another size than it has")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
