"""machine.py: a container's limits count, not the host's size."""

import subprocess
import sys
from pathlib import Path

import pytest

from prismatic import machine


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(64)))
    (tmp_path / "meminfo").write_text("MemTotal: 990000000 kB\nMemAvailable: 400000000 kB\n")
    return tmp_path


def test_a_bare_machine(container: Path) -> None:
    assert machine.available_cores() == 64
    assert machine.available_memory() == 400_000_000 * 1024
    assert machine.simulators_that_fit() == 64


def test_a_container_with_limits(container: Path) -> None:
    (container / "cpu.max").write_text("400000 100000\n")
    (container / "memory.max").write_text("12000000000\n")
    (container / "memory.current").write_text("9000000000\n")
    (container / "memory.stat").write_text("anon 5\ninactive_file 1500000000\n")
    assert machine.available_cores() == 4
    assert machine.available_memory() == 4_500_000_000  # cached files can be given up
    assert machine.simulators_that_fit() == 2


def test_a_container_without_limits(container: Path) -> None:
    (container / "cpu.max").write_text("max 100000\n")
    (container / "memory.max").write_text("max\n")
    assert machine.available_cores() == 64
    assert machine.available_memory() == 400_000_000 * 1024


def test_processes_share_a_machine(container: Path) -> None:
    assert [machine.simulators_that_fit(shares) for shares in (1, 4, 100)] == [64, 16, 1]
    (container / "meminfo").write_text("MemAvailable: 24000000 kB\n")  # twelve simulators of 2 GB
    assert [machine.simulators_that_fit(shares) for shares in (1, 4)] == [12, 3]


def test_at_least_one_simulator(container: Path) -> None:
    (container / "meminfo").write_text("MemAvailable: 1000 kB\n")
    assert machine.simulators_that_fit() == 1


def test_memory_of_this_process_and_its_children() -> None:
    before, alone = machine.resident_with_children(), machine.resident()
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


def test_the_peak_of_memory_is_this_process_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.peak_memory()
    assert before > 10_000_000
    block = bytearray(200_000_000)
    block[::4096] = b"x" * len(block[::4096])  # touched, so that it counts
    del block
    assert machine.peak_memory() >= 200_000_000  # gone, and still the peak
    monkeypatch.setattr(machine, "STATUS", tmp_path / "none")
    assert machine.peak_memory() == 0
