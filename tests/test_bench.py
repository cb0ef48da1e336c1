"""bench.py: what can't be measured or written is said before anything is measured."""

import json
import re
from pathlib import Path

import pytest

import bench
from prismatic.errors import ConfigError


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[bench.BenchConfig]:
    """What was begun, in place of measuring."""
    begun: list[bench.BenchConfig] = []

    def measure(cfg: bench.BenchConfig) -> bench.Rows:
        begun.append(cfg)
        return [{"what": "all", "ms": 1.5}]

    monkeypatch.setattr(bench, "BENCHES", dict.fromkeys(bench.BENCHES, measure))
    return begun


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        (bench.BenchEvalConfig(episodes=0), "--episodes 0: expected a whole number >= 1"),
        (bench.BenchEvalConfig(task_id=-1), "--task_id -1: expected a whole number >= 0"),
        (bench.BenchInferConfig(batch_sizes=(1, 0)), "--batch_sizes (1, 0): expected a whole number >= 1"),
        (bench.BenchInferConfig(quantize=()), "--quantize is empty"),
        (bench.BenchMemoryConfig(cards=()), "--cards is empty"),
        (bench.BenchTrainConfig(memory_cap_gib=-2.5), "--memory_cap_gib -2.5 is no size"),
        (bench.BenchMemoryConfig(cards=(24.0, float("nan"))), "--cards nan: give a finite number"),
        (bench.BenchInferConfig(plot=Path("latency.txt")), "--plot latency.txt is no picture's name"),
        (bench.BenchInferConfig(plot=Path("nowhere/latency.png")), "--plot nowhere/latency.png can't be written"),
        (bench.BenchMemoryConfig(json=Path(".")), "--json . can't be written"),
        (bench.BenchMemoryConfig(json=Path("/dev/null")), "--json /dev/null can't be written"),
    ],
)
def test_nothing_is_measured_in_vain(cfg: bench.BenchConfig, sentence: str, measured: list) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        bench.main(cfg)
    assert not measured


def test_the_table_is_printed_and_kept(tmp_path: Path, measured: list, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = bench.BenchDataConfig(num_workers=(0, 2), loaded_frames=None, json=tmp_path / "table.json")
    bench.main(cfg)
    assert measured == [cfg]
    assert capsys.readouterr().out.splitlines() == ["| what | ms |", "|---|---|", "| all | 1.5 |"]
    assert json.loads((tmp_path / "table.json").read_text()) == [{"what": "all", "ms": 1.5}]


def test_small_sizes_are_sizes(measured: list) -> None:
    for cfg in (
        bench.BenchTrainConfig(memory_cap_gib=0.5),
        bench.BenchMemoryConfig(cards=(0.5,)),
        bench.BenchInferConfig(plot=Path("a.PNG")),
    ):
        bench.main(cfg)
    assert len(measured) == 3
