"""Weights that would act badly without a word are refused as they load: NaN, infinity, whole numbers, zeros, another copy than was written."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
from export import ExportConfig
from prismatic.checkpoint import load_vla
from prismatic.errors import ConfigError
from prismatic.filenames import SUMS, WEIGHTS, WEIGHTS_INDEX
from prismatic.sums import check_sum, write_sums
from prismatic.versions import folder_fingerprint
from tests.conftest import REPOSITORY

MLP = "language_model.model.layers.0.mlp.down_proj.weight"
BIAS = "projector.fc2.bias"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REPOSITORY / "checkpoints" / "openvla-tiny", tmp_path / "checkpoint"))


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_vla(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Files of that name can't be opened by Python: root could."""
    whole = os.open

    def without(path: object, *how: int) -> int:
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return whole(path, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", without)


def put(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / WEIGHTS)


def with_ends(first: float, last: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0], tensor.view(-1)[-1] = first, last
        return tensor

    return change


@pytest.mark.parametrize("name", [MLP, BIAS])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_ends(float("nan"), 0), "NaN"), (with_ends(float("inf"), float("-inf")), "infinity"), (lambda t: t.to(torch.int8), "int8"),
        (lambda t: t.bool(), "bool"), (torch.zeros_like, "zero everywhere"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(
    folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    put(folder, name, change)
    if says == "zero everywhere" and name == BIAS:
        load_vla(folder)  # a bias may be zero
    else:
        sentence = refused(folder)
        assert says in sentence and name in sentence


def test_large_numbers_of_half_precision_are_taken(folder: Path) -> None:
    put(folder, MLP, lambda t: torch.full_like(t.half(), 60_000.0))  # their sum is more than half precision holds
    load_vla(folder)
    load_vla(folder, dtype=torch.float16)


def test_a_file_that_is_not_as_it_was_written_is_refused(folder: Path) -> None:
    write_sums(folder, folder.iterdir())
    load_vla(folder)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-2] ^= 0x40  # the highest bit of an exponent
    (folder / WEIGHTS).write_bytes(content)
    assert SUMS in refused(folder)
    for damage in (b"abc", b"0" * 64 + b"\n", b"\xff" * 100):
        (folder / SUMS).write_bytes(damage)
        assert SUMS in refused(folder)
    (folder / SUMS).unlink()
    load_vla(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "action_head--1_checkpoint.pt"])
def test_a_pointer_of_git_lfs_a_pipe_and_another_users_file_are_called_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8454800\n")
    assert "git lfs pull" in refused(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "no regular file" in refused(folder)
    (folder / name).unlink()
    (folder / name).write_bytes(b"x")
    forbid(monkeypatch, name)
    assert f"{name} can't be read (Permission denied)" in refused(folder)


def test_another_users_tokenizer_file_is_named_when_it_is_copied(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.model").write_bytes(b"x")
    forbid(monkeypatch, "tokenizer.model")
    with pytest.raises(ConfigError, match=rf"{folder / 'tokenizer.model'} can't be read \(Permission denied\)"):
        export.main(ExportConfig(str(folder), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("read", [folder_fingerprint, lambda folder: check_sum(folder / WEIGHTS)])
def test_another_users_file_has_no_fingerprint_and_no_sum(
    folder: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    write_sums(folder, [folder / WEIGHTS])
    forbid(monkeypatch, WEIGHTS)
    with pytest.raises(ConfigError, match=rf"{WEIGHTS} can't be read \(Permission denied\)"):
        read(folder)


@pytest.mark.parametrize(
    "index",
    [
        {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 3}}, [], 3,
        *({"weight_map": {"a": name}} for name in ("../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "x" * 300)),
    ],
    ids=str,
)  # fmt: skip
def test_an_index_is_whole_and_names_files_of_its_folder_only(folder: Path, index: object) -> None:
    shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index))
    assert WEIGHTS_INDEX in refused(folder)


def test_a_tensor_of_two_shards_is_refused(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "stale.safetensors")
    index = {"weight_map": {"a": WEIGHTS, "b": "stale.safetensors"}}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index))
    assert "two shards" in refused(folder)
