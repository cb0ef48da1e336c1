"""bench.py infer: one table in which every way says the same tokens, and a floor that can be worked out by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from prismatic.bench import infer, instruments
from prismatic.bench.plain import PlainDecoder
from prismatic.models import quantize
from prismatic.models.tiny import TINY
from tests.conftest import REPOSITORY

HOW: dict[str, Any] = {
    "quantize": ("none",),
    "batch_sizes": (2,),
    "compiled": False,
    "num_images_in_input": 1,
    "rounds": 2,
    "plot": None,
}
CHECKPOINT = str(REPOSITORY / "checkpoints" / "openvla-tiny")


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments, "CPU_BYTES", 10**7)
    monkeypatch.setattr(instruments, "CPU_SIDE", 256)


def test_every_way_says_the_same_and_is_timed(tmp_path: Path) -> None:
    rows = infer.run(CHECKPOINT, **HOW | {"quantize": ("none", "int8"), "plot": tmp_path / "latency.svg"})
    assert [row["way"] for row in rows] == ["plain", *infer.WAYS[2:], *infer.WAYS[2:]]
    for row in rows:
        assert tuple(row) == infer.COLUMNS and 0 < row["p50 ms"] <= row["p95 ms"] and row["of floor %"] > 0
        assert 0.008 / 4 < row["weights GB"] <= row["peak GB"]
        chunk = row["way"] == "OFT chunk"
        assert row["actions/s"] == pytest.approx((8 if chunk else 1) * 2000 / row["p50 ms"], rel=0.02)
        assert chunk or (row["same tokens %"] > 90 and row["first token ms"] > 0)
    named = {row["way"]: row for row in rows if row["precision"] == "none"}
    assert {row["same tokens %"] for row in named.values()} == {100, ""} and named["plain"]["× plain"] == 1
    assert named["right draft"]["forward passes"] == 2 and named["OFT chunk"]["forward passes"] == 1
    assert "eager (2)" in (tmp_path / "latency.svg").read_text()


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


def test_flop_of_ten_more_tokens() -> None:
    text = TINY.text_config
    attention, mlp = 4 * text.hidden_size**2, 3 * text.hidden_size * text.intermediate_size
    layers = text.num_hidden_layers - 1  # of the last layer all tokens need keys and values only
    before, after = (128 + tokens + 1 for tokens in (30, 40))  # columns: patches, tokens, the empty token's
    products = (after - before) * (layers * (attention + mlp) + attention // 2)
    scores = 2 * text.hidden_size * (layers * (after**2 - before**2) + after - before)
    assert infer.prompt_flop(TINY, 40) - infer.prompt_flop(TINY, 30) == 2 * (products + scores)


def test_ceilings_are_numbers_of_a_computer() -> None:
    cpu = torch.device("cpu")
    assert 1e7 < instruments.bandwidth(cpu) < 1e13
    assert 1e7 < instruments.matrix_rate(cpu, torch.float32) < 1e15
