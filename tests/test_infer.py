"""bench.py infer: one table in which every way says the same tokens."""

from typing import Any

import pytest
import torch

from prismatic.bench import infer
from prismatic.bench.plain import PlainDecoder
from prismatic.models import quantize
from tests.conftest import REPOSITORY

HOW: dict[str, Any] = {
    "quantize": ("none",),
    "batch_sizes": (2,),
    "compiled": False,
    "num_images_in_input": 1,
    "rounds": 2,
}
CHECKPOINT = str(REPOSITORY / "checkpoints" / "openvla-tiny")


def test_every_way_says_the_same_and_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, decoder_for = [], infer.decoder_for
    monkeypatch.setattr(infer, "decoder_for", lambda vla: (made.append(vla.config.action_head), decoder_for(vla))[1])
    rows = infer.run(CHECKPOINT, **{**HOW, "quantize": ("none", "int8")})
    assert [row["way"] for row in rows] == ["plain", *infer.WAYS[2:], *infer.WAYS[2:]]
    assert (
        made == ["tokens", "l1"] * 2
    )  # one decoder for all the ways of a precision: on a GPU each compiles for minutes
    for row in rows:
        assert tuple(row) == infer.COLUMNS and 0 < row["p50 ms"] <= row["p95 ms"]
        assert 0.008 / 4 < row["weights GB"] <= row["peak GB"]
        chunk = row["way"] == "OFT chunk"
        assert row["actions/s"] == pytest.approx((8 if chunk else 1) * 2000 / row["p50 ms"], rel=0.02)
        assert chunk or row["same tokens %"] > 90
    named = {row["way"]: row for row in rows if row["precision"] == "none"}
    assert {row["same tokens %"] for row in named.values()} == {100, ""} and named["plain"]["× plain"] == 1
    assert named["right draft"]["forward passes"] == 2 and named["OFT chunk"]["forward passes"] == 1


def test_tokens_that_differ_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PlainDecoder.__call__
    monkeypatch.setattr(PlainDecoder, "__call__", lambda self, *inputs: honest(self, *inputs).flip(1))
    with pytest.raises(RuntimeError, match="not the plain way's"):
        infer.run(CHECKPOINT, **HOW)


def test_what_cannot_run_is_a_row_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*inputs: object) -> None:
        raise torch.OutOfMemoryError("no memory\nmore")

    monkeypatch.setattr(quantize, "quantize", refused)
    monkeypatch.setattr(PlainDecoder, "__call__", refused)
    plain, *_, int8 = infer.run(CHECKPOINT, **HOW | dict[str, Any](quantize=("none", "int8")))
    for row in (plain, int8):
        assert row["p50 ms"] == "" and row["note"].startswith("OutOfMemoryError: no memory") and "\n" not in row["note"]
