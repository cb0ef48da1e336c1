"""The comparison of training speeds: it refuses to compare two ways that differ, and its table holds what it says."""

import pytest
import torch

from prismatic.bench import train
from prismatic.bench.plain import PlainVLA
from prismatic.errors import ConfigError
from prismatic.models.graphs import Recorder
from prismatic.models.tiny import TINY
from prismatic.models.vla import VLA
from prismatic.training import cuda_graph
from tests.test_cuda_graph import CallingRecorder, Refusing

BENCH = train.Bench(TINY, "cpu", torch.float32, steps=1)


def test_both_ways_give_one_loss_and_the_same_gradients() -> None:
    loss, gradient = train.check_equal(train.random_base(BENCH), BENCH)
    assert loss < 1e-5 and 0 < gradient < 1e-4


def test_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    share = PlainVLA.share

    def different(vla: VLA) -> PlainVLA:
        plain = share(vla)
        plain.projector.fc3.bias = torch.nn.Parameter(plain.projector.fc3.bias + 0.1)
        return plain

    monkeypatch.setattr(PlainVLA, "share", different)
    with pytest.raises(ConfigError, match="the two ways differ: loss"):
        train.check_equal(train.random_base(BENCH), BENCH)


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SMALL", TINY)
    rows = train.run(full_size=False, memory_cap_gib=24, batch_sizes=(2,), steps=1, compiled=False, graphs=True)
    ways = [(row["way"], row["micro-batch"], row["recomputed"]) for row in rows]
    assert ways == [("plain", 2, "no"), ("ours", 2, "no"), ("ours", 2, "yes"), ("ours, NF4 base", 1, "yes")]
    plain, mine, recomputed, packed = (row["peak GiB"] for row in rows)
    assert packed < recomputed < mine < plain
    assert rows[0]["ratio"] == 1.0 and rows[1]["ratio"] == pytest.approx(
        rows[1]["samples/s"] / rows[0]["samples/s"], abs=0.02
    )


def test_recorded_passes_are_timed_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = train.random_base(BENCH)

    def tried(recorder: type[Recorder]) -> tuple[float, float] | str:
        monkeypatch.setattr(cuda_graph, "Recorder", recorder)
        return train.tried(lambda: train.ours(base, BENCH, checkpointing=False), BENCH, 1, way=train.RECORDED)

    found = tried(CallingRecorder)
    assert isinstance(found, tuple) and all(number > 0 for number in found)
    assert tried(Refusing) == train.TOO_LARGE

    class Failing(CallingRecorder):
        def record(self, work):
            raise RuntimeError("no such thing")

    found = tried(Failing)
    rows = [train.Row(train.PLAIN, 1, False, (1.0, 1.0)), train.Row(train.RECORDED, 1, False, found)]
    row = train._table(rows, BENCH, rate=1e9, flops=10**6)[1]
    assert row["samples/s"].startswith("a training pass can't be recorded (no such thing)") and row["ratio"] == ""


def test_recorded_ways_come_last_and_only_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "tried", lambda make, bench, size, *, way: (1.0, 1.0))
    gpu = train.Bench(TINY, "cuda", torch.float32, steps=1)
    base = train.random_base(BENCH)
    for bench, graphs in ((gpu, True), (gpu, False), (BENCH, True)):
        found = [(row.way, row.size) for row in train._rows(base, bench, (1, 2), compiled=False, graphs=graphs)]
        plainly = [(way, size) for size in (1, 2) for way in (train.PLAIN, train.OURS, train.OURS)]
        recorded = [(train.RECORDED, size) for size in (1, 1, 2, 2)] if bench is gpu and graphs else []
        assert found == plainly + recorded


def test_what_does_not_fit_is_not_tried_at_a_larger_size(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"plain": 1, "ours": 4}
    monkeypatch.setattr(
        train,
        "tried",
        lambda make, bench, size, *, way: (1.0, 1.0) if size <= limits[way] else train.TOO_LARGE,
    )
    rows = list(train._rows(train.random_base(BENCH), BENCH, (1, 2, 4, 8), compiled=False, graphs=True))
    assert [row.size for row in rows if row.way == "plain"] == [1, 2] and rows[-1].size == 8
    table = train._table(rows, BENCH, rate=1e9, flops=10**6)
    assert [row["samples/s"] for row in table if row["way"] == "plain"] == [1.0, "doesn't fit"]
