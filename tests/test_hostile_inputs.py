"""No damage to any kind of file is a traceback or, where there are sums, another answer (tests/hostile_inputs.py prints the table)."""

import pytest

from tests.hostile_inputs import KINDS, Kind, tried


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_damage_is_one_sentence(kind: Kind) -> None:
    counts = tried(kind)
    assert counts["refused"] > 0
    assert not [what for what in counts if what.startswith(("traceback", "wrong"))], counts
