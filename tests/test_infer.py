"""bench.py infer: one table in which every way says the same words, and a floor that can be worked out by hand."""

from pathlib import Path

import pytest
import torch

from prismatic.bench import ceilings, infer
from prismatic.bench.plain import PlainDecoder
from prismatic.models.tiny import TINY
from tests.conftest import REPOSITORY

CHECKPOINT = Path(REPOSITORY / "checkpoints" / "openvla-tiny")


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "CPU_BYTES", 10**7)
    monkeypatch.setattr(ceilings, "CPU_SIDE", 256)


def test_every_way_says_the_same_and_is_timed(tmp_path: Path) -> None:
    rows = infer.run(CHECKPOINT, batch_sizes=(2,), precisions=("none",), rounds=2, device="cpu", compiled=False)
    named = {row["way"]: row for row in rows}
    assert [tuple(row) for row in rows] == [infer.COLUMNS] * 6
    assert "left out" in named.pop("plain, static cache, compiled")["note"]
    assert set(named) == {
        "plain", "ours, eager", "ours, compiled", "ours, compiled + drafting, all right", "ours, compiled + drafting, all wrong",
    }  # fmt: skip
    for row in named.values():
        assert row["same words %"] == 100 and row["first word ms"] > 0 and 0 < row["p50 ms"] <= row["p95 ms"]
        assert 0.008 < row["weights GB"] <= row["peak GB"]
        assert row["actions/s"] == pytest.approx(2000 / row["p50 ms"], rel=0.02)
    assert named["plain"]["× plain"] == 1
    infer.plot(rows, tmp_path / "latency.svg")
    assert "ours, eager (2)" in (tmp_path / "latency.svg").read_text()


def test_words_that_differ_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PlainDecoder.__call__
    monkeypatch.setattr(PlainDecoder, "__call__", lambda self, *inputs: honest(self, *inputs).flip(1))
    with pytest.raises(RuntimeError, match="not the plain way's"):
        infer.run(CHECKPOINT, batch_sizes=(1,), precisions=("none",), rounds=1, device="cpu", compiled=False)


def test_what_cannot_be_quantised_is_a_row_with_a_reason() -> None:
    rows = infer.run(CHECKPOINT, batch_sizes=(1, 8), precisions=("int3",), rounds=1, device="cpu", compiled=False)  # type: ignore[arg-type]
    assert [(row["batch"], row["p50 ms"]) for row in rows] == [(1, ""), (8, "")] and all(row["note"] for row in rows)


def test_flop_of_ten_more_words() -> None:
    text = TINY.text_config
    attention, mlp = 4 * text.hidden_size**2, 3 * text.hidden_size * text.intermediate_size
    layers = text.num_hidden_layers - 1  # of the last layer all words need keys and values only
    before, after = (128 + words + 1 for words in (30, 40))  # columns: patches, words, the empty token's
    products = (after - before) * (layers * (attention + mlp) + attention // 2)
    scores = 2 * text.hidden_size * (layers * (after**2 - before**2) + after - before)
    assert ceilings.prompt_flop(TINY, 40) - ceilings.prompt_flop(TINY, 30) == 2 * (products + scores)


def test_ceilings_are_numbers_of_a_computer() -> None:
    cpu = torch.device("cpu")
    assert 1e7 < ceilings.bandwidth(cpu) < 1e13
    assert 1e7 < ceilings.matrix_rate(cpu, torch.float32) < 1e15
