"""bench.py: what can't be measured or written is said before anything is measured."""

import inspect
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest

import bench
from prismatic.bench import memory
from prismatic.data.mixture import open_cache
from prismatic.errors import ConfigError
from prismatic.models.tiny import TINY


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The flags of what was begun, in place of measuring."""
    begun: list[dict[str, Any]] = []

    def run(**flags: object) -> list[dict[str, Any]]:
        begun.append(flags)
        return [{"what": "all", "ms": 1.5}]

    monkeypatch.setattr(
        bench, "importlib", types.SimpleNamespace(import_module=lambda name: types.SimpleNamespace(run=run))
    )
    return begun


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        (bench.BenchEvalConfig(episodes=0), "--episodes 0: expected a whole number >= 1"),
        (bench.BenchInferConfig(batch_sizes=(1, 0)), "--batch_sizes (1, 0): expected a whole number >= 1"),
        (bench.BenchInferConfig(quantize=()), "--quantize (): expected a list of length >= 1"),
        (bench.BenchMemoryConfig(cards=(24.0, float("nan"))), "--cards (24.0, nan): expected a number > 0"),
        (bench.BenchMemoryConfig(json=Path("nowhere/table.json")), "--json nowhere/table.json can't be written"),
        (bench.BenchMemoryConfig(json=Path(".")), "--json . can't be written"),
    ],
)
def test_nothing_is_measured_in_vain(cfg: bench.BenchConfig, sentence: str, measured: list) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        bench.main(cfg)
    assert not measured


def test_the_table_is_printed_and_kept(tmp_path: Path, measured: list, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(bench.BenchMemoryConfig(cards=(0.5, 2), json=tmp_path / "table.json"))
    assert measured == [{"cards": (0.5, 2)}]
    assert capsys.readouterr().out.splitlines() == ["| what | ms |", "|---|---|", "| all | 1.5 |"]
    assert json.loads((tmp_path / "table.json").read_text()) == [{"what": "all", "ms": 1.5}]


@pytest.mark.parametrize("name", bench.BENCHES)
def test_each_bench_takes_its_flags(name: str) -> None:
    run = __import__(f"prismatic.bench.{name}", fromlist=["run"]).run
    flags = {field.name for field in bench.dataclasses.fields(bench.BENCHES[name])} - {"json"}
    taken = inspect.signature(run).parameters
    named = {name for name, one in taken.items() if one.kind is not one.VAR_KEYWORD} - {"config"}
    handed_on = set(inspect.signature(open_cache).parameters) - {"root", "name"} if "data" in taken else set()
    assert flags == named | handed_on


def test_what_fits_on_which_card() -> None:
    rows = memory.run((0.001, 0.4), TINY)
    small, (kept, recomputed, _) = rows[:3], rows[3:6]
    assert [row["base"] for row in small] == ["bfloat16", "bfloat16", "NF4"]
    assert all(row["largest micro-batch"] == "doesn't fit" and row["planned GiB"].endswith(" at 1") for row in small)
    assert 1 <= kept["largest micro-batch"] < memory.MOST and float(kept["planned GiB"]) <= 0.4
    assert recomputed["largest micro-batch"] == f"{memory.MOST} and more"
    assert [row["card"] for row in rows[6:]] == ["1 x 0.4 GB", "4 x 0.4 GB", "8 x 0.4 GB"]
