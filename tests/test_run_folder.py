"""A run on disk: which step folders stay, what a killed run leaves, what a damaged folder or a full disk does."""

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prismatic.errors import ConfigError
from prismatic.filenames import OPTIONS
from prismatic.sums import read_sums, sha256
from prismatic.training.run_folder import RunFolder


def nothing(folder: Path) -> None:
    """What a checkpoint holds here."""


def weights(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes(1000))


def names(run: RunFolder) -> list[str]:
    return [folder.name for folder in run.checkpoints()]


def test_the_newest_stay_also_past_a_million_and_the_best_beside_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, keep=2)
    assert run.best() is None and run.is_best(9.0)
    for step in (998_000, 999_000, 1_000_000, 1_001_000):
        run.save(step, nothing, {"step": step})
        if step < 1_000_000:
            run.mark_best(step, 1e6 - step)
    assert names(run) == ["step-999000", "step-1000000", "step-1001000"]
    assert run.best() == {"step": 999_000, "value": 1000.0} and (tmp_path / "best").resolve().name == "step-999000"
    assert run.is_best(999.0) and not run.is_best(1000.0)
    run.mark_best(1_001_000, 0.1)
    assert names(run) == ["step-1000000", "step-1001000"] and (tmp_path / "best").resolve().name == "step-1001000"
    assert read_sums(tmp_path / "latest").keys() == {"training_state.pt"}
    with pytest.raises(ConfigError, match="another process"):
        RunFolder(tmp_path, keep=2)
    del run
    (tmp_path / ".unfinished-step-000003.partial").mkdir()  # of a killed run
    (tmp_path / ".unfinished-finetune.json").write_text("{")
    assert RunFolder(tmp_path, keep=2).best() == {"step": 1_001_000, "value": 0.1}
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_copy_that_followed_links_and_a_step_folder_that_lies_elsewhere_go_on(tmp_path: Path) -> None:
    run, elsewhere = RunFolder(tmp_path / "run", keep=2), tmp_path / "elsewhere"
    for step in (1, 2):
        run.save(step, weights, {})
    run.mark_best(2, float("nan") if run.is_best(float("nan")) else 0.5)
    del run
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # as scp -r does it
    (tmp_path / "copy" / "step-000001").rename(elsewhere)
    (tmp_path / "copy" / "step-000001").symlink_to(elsewhere)
    (tmp_path / "copy" / "step-000000").write_text("a note")
    run = RunFolder(tmp_path / "copy", keep=2)
    newest = run.newest_whole()
    assert newest and newest.name == "step-000002" and (run.path / "latest").is_symlink()
    run.save(3, weights, {})
    run.mark_best(3, 0.1)
    assert names(run) == ["step-000002", "step-000003"] and (run.path / "best").readlink() == Path("step-000003")
    assert elsewhere.is_dir() and (run.path / "latest-copied" / "weights").is_file()


def test_sums_that_name_a_pipe_or_a_device_are_damage(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, keep=3)
    for step in (1, 2, 3):
        run.save(step, weights, {})
    with (tmp_path / "step-000003" / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  /dev/zero\n")
    (tmp_path / "step-000002" / "weights").unlink()
    os.mkfifo(tmp_path / "step-000002" / "weights")
    newest = run.newest_whole()
    assert newest and newest.name == "step-000001"


def test_options_may_change_until_a_step_is_saved(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, keep=2)
    for quantised in (False, True):  # as the memory plan advises
        run.check_options({"use_quantization": quantised}, may_change=())
    run.save(1, nothing, {})
    with pytest.raises(ConfigError, match="was begun with --use_quantization True, not False"):
        run.check_options({"use_quantization": False}, may_change=())
    run.check_options({"use_quantization": True, "dataset_name": "a"}, may_change=())
    run.check_options({"dataset_name": "a/"}, may_change=())  # as a shell completes it
    (tmp_path / OPTIONS).unlink()  # each step has its own copy
    with pytest.raises(ConfigError, match="was begun with --use_quantization True, not False"):
        run.check_options({"use_quantization": False}, may_change=())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("CUDA error: launch failed")])
def test_what_a_gpu_says_while_saving_is_not_taken_for_a_full_disk(tmp_path: Path, error: Exception) -> None:
    run = RunFolder(tmp_path, keep=2)

    def write(folder: Path) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        run.save(1, write, {})
    assert not names(run) and not list(tmp_path.glob(".unfinished*"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "state cut": ("training_state.pt", cut), "bit flipped": ("training_state.pt", flip), "weights cut": ("weights", cut),
    "weights lost": ("weights", Path.unlink), "sums empty": ("SHA256SUMS", lambda path: path.write_bytes(b"")),
    "sums lost": ("SHA256SUMS", Path.unlink),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    file, harm = DAMAGES[damage]
    run = RunFolder(tmp_path, keep=2)
    first, second = (run.save(step, weights, {}) for step in (1, 2))
    assert run.newest_whole() == second
    harm(second / file)
    assert run.newest_whole() == first == (tmp_path / "latest").resolve()
    assert f"step-000002 is damaged ({file}" in (said := capsys.readouterr().out)
    assert "step-000001 takes its place" in said and (tmp_path / "damaged-step-000002").is_dir()
    harm(first / file)
    with pytest.raises(ConfigError, match=rf"step-000001 is damaged \({file}.*delete .* to begin again"):
        run.newest_whole()
    assert first.is_dir()


@pytest.mark.parametrize("what", ["weights", "state"])
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path: Path, what: str) -> None:
    """A limit on the size of files stands in for a full disk: writing fails half-way, in the same place."""
    run, large = RunFolder(tmp_path, keep=2), {"x": torch.zeros(50_000)}
    kept = run.save(1, nothing, {})
    write = (lambda folder: save_file(large, folder / "weights")) if what == "weights" else nothing
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"step-000002 \(.*\): make room"):
            run.save(2, write, large if what == "state" else {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert run.checkpoints() == [kept] == [run.newest_whole()] and not list(tmp_path.glob(".unfinished*"))


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"cannot write .*file.* \(Not a directory\): make room, or give another --run_root_dir"
    ):
        RunFolder(tmp_path / "file" / "run", keep=1)


def test_sums_of_any_sha256sum_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    digest = sha256(tmp_path / "a")
    for line in (f"{digest}  a", f"{digest} *a", f"{digest.upper()}  ./a"):
        (tmp_path / "SHA256SUMS").write_text(line + "\n")
        assert read_sums(tmp_path) == {"a": digest}
