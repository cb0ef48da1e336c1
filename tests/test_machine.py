"""machine.py: a container's limits count, not the host's size."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from prismatic import machine
from prismatic.errors import ConfigError
from tests.conftest import REPOSITORY


def available(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=number))


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(64)))
    available(monkeypatch, 400_000_000_000)
    return tmp_path


@pytest.mark.parametrize(("cpu", "memory"), [("", ""), ("max 100000\n", "max\n")], ids=["bare", "no limits"])
def test_without_limits_the_machine_counts(
    container: Path, monkeypatch: pytest.MonkeyPatch, cpu: str, memory: str
) -> None:
    (container / "cpu.max").write_text(cpu)
    (container / "memory.max").write_text(memory)
    assert machine.available_cores() == 64
    assert machine.available_memory() == 400_000_000_000
    assert [machine.simulators_that_fit(shares) for shares in (1, 4, 100)] == [64, 16, 1]
    for free, fit in ((24_000_000_000, [12, 3]), (1_000_000, [1, 1])):  # by the memory
        available(monkeypatch, free)
        assert [machine.simulators_that_fit(shares) for shares in (1, 4)] == fit


def test_a_containers_limits_count(container: Path) -> None:
    (container / "cpu.max").write_text("400000 100000\n")
    (container / "memory.max").write_text("12000000000\n")
    (container / "memory.current").write_text("9000000000\n")
    (container / "memory.stat").write_text("anon 5\ninactive_file 1500000000\n")
    assert machine.available_cores() == 4
    assert machine.available_memory() == 4_500_000_000  # cached files can be given up
    assert machine.simulators_that_fit() == 2


def test_memory_of_this_process_and_its_children() -> None:
    alone, before = machine.resident(), machine.resident_with_children()
    assert 0 < alone <= before
    child = subprocess.Popen(
        [sys.executable, "-c", "x = bytearray(50_000_000); print(flush=True); input()"], stdin=-1, stdout=-1
    )
    assert child.stdout is not None
    child.stdout.readline()
    with_child = machine.resident_with_children()
    child.communicate(b"\n")
    assert with_child - before > 45_000_000
    assert machine.resident(pid=child.pid) == 0


def test_the_peak_of_memory_is_this_process_own() -> None:
    """Not its parent's, which getrusage gives; and what is gone is still the peak."""
    code = "from prismatic.machine import peak_memory as peak; before = peak(); bytes(b'x' * 200_000_000); print(before, peak())"
    held = bytearray(b"x" * 150_000_000)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < len(held) and after - before > 190_000_000


def test_a_gpu_that_torch_cannot_use_is_said_unless_it_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(machine, "gpus", lambda: [{"name": "NVIDIA A10", "driver": "535.1"}])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for cuda, sentence in (
        ("13.0", r"CUDA 13\.0, .*driver 535\.1: take a newer driver, "),
        (None, "is a CPU's: take torch"),
    ):
        monkeypatch.setattr("torch.version.cuda", cuda)
        with pytest.raises(ConfigError, match=rf"NVIDIA A10 is here, .*{sentence}.*CUDA_VISIBLE_DEVICES= "):
            machine.uses_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not machine.uses_gpu()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert machine.uses_gpu()


def test_a_process_without_a_gpu_of_its_own_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert machine.own_gpu(0) == "cuda:0"
    with pytest.raises(ConfigError, match=r"process 1 of this machine has no GPU, there are 1: .*--nproc-per-node"):
        machine.own_gpu(1)
