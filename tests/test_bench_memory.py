"""What fits on which card, of the small model."""

from prismatic.bench import memory
from prismatic.models.tiny import TINY


def test_the_table() -> None:
    rows = memory.run((0.001, 0.4), TINY)
    small, large = (rows[at : at + 3] for at in (0, 3))
    assert [row["base"] for row in small] == ["bfloat16", "bfloat16", "NF4"]
    assert all(row["largest micro-batch"] == "doesn't fit" and row["planned GiB"].endswith(" at 1") for row in small)
    kept, recomputed, _ = large
    assert 1 <= kept["largest micro-batch"] < memory.MOST and float(kept["planned GiB"]) <= 0.4
    assert recomputed["largest micro-batch"] in (
        f"{memory.MOST} and more",
        *range(kept["largest micro-batch"] + 1, memory.MOST),
    )
    assert [row["card"] for row in rows[6:]] == ["1 x 0.4 GB", "4 x 0.4 GB", "8 x 0.4 GB"]
