"""Arrays of an .npz file, whose size is looked at before anything of it is made."""

import io
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
        try:  # a member is read to its end, where its checksum is compared: numpy alone stops where a header says
            return {name.removesuffix(".npy"): _array(archive.read(name)) for name in archive.namelist()}
        except zipfile.BadZipFile as error:
            raise ValueError(f"an array has another checksum than it should ({error})") from None
        except MemoryError as error:
            raise ValueError(f"an array claims more than there is memory ({error})") from None


def _array(npy: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(npy), allow_pickle=False)
