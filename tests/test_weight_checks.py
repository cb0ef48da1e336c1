"""Weights that would act badly without a word are refused as they load: NaN, infinity, whole numbers, zeros, another copy than was written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismatic.checkpoint import load_vla
from prismatic.errors import ConfigError
from prismatic.filenames import SUMS, WEIGHTS, WEIGHTS_INDEX
from prismatic.sums import write_sums
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "checkpoints" / "openvla-tiny"
MLP = "language_model.model.layers.0.mlp.down_proj.weight"
TOWER = "vision_backbone.featurizer.blocks.0.mlp.fc1.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "checkpoint"))


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_vla(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def filled(*values: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The tensor with these values at its beginning."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[: len(values)] = torch.tensor(values)
        return tensor

    return change


@pytest.mark.parametrize("name", [MLP, TOWER, "projector.fc2.bias"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (filled(float("nan")), "NaN"), (filled(float("inf")), "infinity"), (filled(float("inf"), -float("inf")), "infinity"),
        (lambda t: t.to(torch.int8), "int8"), (lambda t: t.bool(), "bool"), (lambda t: t.to(torch.int64), "int64"),
        (torch.zeros_like, "zero everywhere"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(
    folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / WEIGHTS)
    if says == "zero everywhere" and name.endswith("bias"):
        load_vla(folder)  # a bias may be zero
    else:
        sentence = refused(folder)
        assert says in sentence and name in sentence


def test_large_numbers_of_half_precision_are_taken(folder: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors[MLP] = torch.full_like(tensors[MLP], 60_000.0)  # its sum is more than half precision holds
    save_file(tensors, folder / WEIGHTS)
    load_vla(folder)
    load_vla(folder, dtype=torch.float16)


def test_a_file_that_is_not_as_it_was_written_is_refused(folder: Path) -> None:
    write_sums(folder, folder.iterdir())
    load_vla(folder)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-2] ^= 0x40  # the highest bit of an exponent
    (folder / WEIGHTS).write_bytes(content)
    assert SUMS in refused(folder)
    (folder / SUMS).unlink()
    load_vla(folder)


@pytest.mark.parametrize("damage", [b"", b"abc", b"0" * 64 + b"\n", b"\xff" * 100])
def test_damaged_sums_are_one_sentence(folder: Path, damage: bytes) -> None:
    (folder / SUMS).write_bytes(damage)
    if damage:
        assert SUMS in refused(folder)


def test_a_pointer_of_git_lfs_is_called_one(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8454800\n")
    assert "git lfs pull" in refused(folder)


def test_weights_that_are_no_file_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    assert "no regular file" in refused(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ""])
def test_an_index_names_files_of_its_folder_only(folder: Path, name: str) -> None:
    shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")
    names = dict.fromkeys(load_file(folder / WEIGHTS), name)
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": names}))
    assert WEIGHTS_INDEX in refused(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 3}}, [], 3])
def test_a_damaged_index_is_one_sentence(folder: Path, index: object) -> None:
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index))
    assert WEIGHTS_INDEX in refused(folder)
