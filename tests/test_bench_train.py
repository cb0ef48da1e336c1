"""The comparison of training speeds: it refuses to compare two ways that differ, and its table holds what it says."""

import pytest
import torch

from prismatic.bench import train
from prismatic.bench.plain import PlainVLA
from prismatic.errors import ConfigError
from prismatic.models.tiny import TINY
from prismatic.models.vla import VLA
from prismatic.training.activations import shallow

BENCH = train.Bench(TINY, torch.device("cpu"), torch.float32, steps=1)
HOW = {"memory_cap_gib": 24, "steps": 1}


def test_both_ways_give_one_loss_and_the_same_gradients() -> None:
    loss, gradient = train.check_equal(BENCH)
    assert loss < 1e-5 and gradient < 1e-4
    # they are two models, also where the gradients are equal to the bit, as on some CPUs
    plain, ours = (isinstance(train.model_of(BENCH, way, way == "ours"), PlainVLA) for way in ("plain", "ours"))
    assert plain and not ours


def test_on_a_gpu_one_block_of_each_kind_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 the difference grows with depth, beyond what may be allowed."""
    seen, model_of = [], train.model_of
    monkeypatch.setattr(train.Bench, "on_gpu", property(lambda bench: True))
    monkeypatch.setattr(train, "model_of", lambda bench, *how: (seen.append(bench.config), model_of(bench, *how))[1])
    train.check_equal(BENCH)
    assert seen == [shallow(BENCH.config)] * 2 != [BENCH.config] * 2


def test_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    share = PlainVLA.share

    def different(vla: VLA) -> PlainVLA:
        plain = share(vla)
        plain.projector.fc3.bias = torch.nn.Parameter(plain.projector.fc3.bias + 0.1)
        return plain

    monkeypatch.setattr(PlainVLA, "share", different)
    with pytest.raises(ConfigError, match="the two ways differ: loss"):
        train.check_equal(BENCH)


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SMALL", TINY)
    rows = train.run(batch_sizes=(2,), **HOW)
    ways = [(row["way"], row["micro-batch"], row["recomputed"]) for row in rows]
    assert ways == [
        ("plain", 2, "False"),
        *(("ours", 2, way) for way in ("False", "selective", "True")),
        ("NF4", 1, "True"),
    ]
    plain, ours, _, recomputed, packed = (row["peak GiB"] for row in rows)
    assert packed < recomputed < ours < plain
    speed = rows[1]["samples/s"] / rows[0]["samples/s"]
    assert rows[0]["ratio"] == 1.0 and rows[1]["ratio"] == pytest.approx(speed, abs=0.02)


def test_what_does_not_fit_is_not_tried_at_a_larger_size(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"plain": 1, "ours": 4, "NF4": 0}

    def speed_and_peak(bench: object, way: str, size: int, recomputed: object) -> tuple[float, float]:
        if size > limits[way]:
            raise torch.OutOfMemoryError
        return 2.0 * size, 1.0

    monkeypatch.setattr(train, "SMALL", TINY)
    monkeypatch.setattr(train, "speed_and_peak", speed_and_peak)
    rows = train.run(batch_sizes=(1, 2, 4, 8), **HOW)
    plain = [(row["micro-batch"], row["samples/s"]) for row in rows if row["way"] == "plain"]
    assert plain == [(1, 2.0), (2, "doesn't fit")] and rows[-2]["micro-batch"] == 8
    assert [row["ratio"] for row in rows if row["way"] == "ours" and row["recomputed"] == "True"] == [1, 2, 4, ""]
