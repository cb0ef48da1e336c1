"""The comparison of training speeds: it refuses to compare two ways that differ, and its table holds what it says."""

import pytest
import torch

from prismatic.bench import train
from prismatic.bench.plain import PlainVLA
from prismatic.errors import ConfigError
from prismatic.models.tiny import TINY
from prismatic.models.vla import VLA

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
    rows = train.run(full_size=False, memory_cap_gib=24, batch_sizes=(2,), steps=1, compiled=False)
    ways = [(row["way"], row["micro-batch"], row["recomputed"]) for row in rows]
    assert ways == [("plain", 2, "no"), ("ours", 2, "no"), ("ours", 2, "yes"), ("ours, NF4 base", 1, "yes")]
    plain, mine, recomputed, packed = (row["peak GiB"] for row in rows)
    assert packed < recomputed < mine < plain
    assert rows[0]["ratio"] == 1.0 and rows[1]["ratio"] == pytest.approx(
        rows[1]["samples/s"] / rows[0]["samples/s"], abs=0.02
    )


def test_what_does_not_fit_is_not_tried_at_a_larger_size(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"plain": 1, "ours": 4}
    monkeypatch.setattr(
        train,
        "tried",
        lambda make, bench, size, *, way: (1.0, 1.0) if size <= limits[way] else train.TOO_LARGE,
    )
    rows = list(train._rows(train.random_base(BENCH), BENCH, (1, 2, 4, 8), compiled=False))
    assert [row.size for row in rows if row.way == "plain"] == [1, 2] and rows[-1].size == 8
    table = train._table(rows, BENCH, rate=1e9, flops=10**6)
    assert [row["samples/s"] for row in table if row["way"] == "plain"] == [1.0, "doesn't fit"]
