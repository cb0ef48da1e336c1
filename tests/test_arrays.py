"""An .npz is believed only as far as its bytes go."""

import os
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from prismatic.arrays import read_arrays


def test_arrays_come_back(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "words": np.array("go"), "none": np.zeros((0, 7), np.float32)}
    np.savez(tmp_path / "plain.npz", allow_pickle=False, **arrays)
    np.savez_compressed(tmp_path / "packed.npz", allow_pickle=False, **arrays)
    for name in ("plain.npz", "packed.npz"):
        found = read_arrays(tmp_path / name)
        assert list(found) == list(arrays) and all(np.array_equal(found[key], arrays[key]) for key in arrays)


def test_a_claim_of_20_gb_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({5 * 10**9},)}}".ljust(117) + "\n"
    claim = np.lib.format.MAGIC_PREFIX + b"\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive:
        archive.writestr("action.npy", claim + b"\0" * 300_000)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("action.npy", b"\0" * (65 << 20))
    for name in ("claim.npz", "bomb.npz"):
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"claims another size|far more"):
            read_arrays(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
        tracemalloc.stop()


def test_pipes_and_objects_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    for path in (tmp_path / "pipe.npz", tmp_path / "objects.npz", tmp_path / "none.npz", tmp_path):
        with pytest.raises((ValueError, zipfile.BadZipFile, zlib.error)):
            read_arrays(path)
