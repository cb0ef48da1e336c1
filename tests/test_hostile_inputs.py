"""No damage to any kind of file is a traceback or, where there are sums, another answer (tests/hostile_inputs.py prints the table)."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile_inputs import KINDS, Kind, changed, fields, outcome, same, tried

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_damage_is_one_sentence(kind: Kind) -> None:
    counts = tried(kind, most=80)  # the table tries more
    assert counts["refused"] > 0
    assert not [what for what in counts if what.startswith(("traceback", "wrong"))], counts


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.file.endswith("_config.json") or kind.file in (
    "config.json", "processor.json", "dataset_statistics.json", "run.json", "meta/info.json")], ids=str)  # fmt: skip
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_at_any_field_is_read_or_refused(kind: Kind, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "folder"
    if not folder.exists():
        folder.mkdir()
        kind.make(folder)
        (tmp_path / "good.json").write_bytes((folder / kind.file).read_bytes())
    content: Any = json.loads((tmp_path / "good.json").read_text())
    place = data.draw(st.sampled_from(list(fields(content))))
    (folder / kind.file).write_text(json.dumps(changed(content, place, data.draw(JSON_VALUES))))
    assert not outcome(kind, folder, same(content)).startswith("traceback")
