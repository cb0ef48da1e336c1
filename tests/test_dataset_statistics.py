"""Statistics make sense or are refused by one sentence that names the field: NaN, words, lengths, order, masks."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismatic.dataset_statistics import check_entry, load_statistics, statistics_key
from prismatic.errors import ConfigError
from prismatic.filenames import CONFIG, STATISTICS
from prismatic.normalize import action_statistics

ACTIONS = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
ENTRY = action_statistics(ACTIONS, ACTIONS[:, :3] * 2, 4)
NAN = float("nan")
Change = Callable[[dict[str, Any]], object]
COLUMNS = ("q01", "q99", "min", "max", "mean", "std")


def changed(change: Change) -> dict[str, Any]:
    entry = copy.deepcopy(ENTRY)
    change(entry)
    return entry


def replaced(column: str, value: Any) -> Change:
    return lambda entry: entry["action"].update({column: value})


def replaced_at(column: str, place: int, value: Any) -> Change:
    return lambda entry: entry["action"][column].__setitem__(place, value)


NONSENSE: dict[str, Change] = {
    **{f"{column} {value}": replaced_at(column, 2, value) for column in COLUMNS for value in (NAN, None, "a", 1e308, -1e308, float("inf"), [])},
    **{f"all of {column} {value!r:.20}": replaced(column, value) for column in COLUMNS for value in (None, [], {}, "0.1", 3, [NAN] * 7, [0.0] * 6)},
    **{f"mask {value!r:.20}": replaced("mask", value) for value in (None, [True] * 6, [True] * 8, [False] * 7, [1] * 7, "true", [])},
    "q01 and q99 exchanged": lambda e: e["action"].update(q01=e["action"]["q99"], q99=e["action"]["q01"]),
    "one dimension exchanged": lambda e: e["action"]["q01"].__setitem__(1, e["action"]["q99"][1] + 1),
    "nothing moves": lambda e: e["action"].update(q01=e["action"]["q99"]),
    "std negative": replaced_at("std", 0, -0.1),
    "no action": lambda e: e.pop("action"),
    "no q01": lambda e: e["action"].pop("q01"),
    "no q99": lambda e: e["action"].pop("q99"),
    "counts": lambda e: e.update(num_transitions=-1),
}  # fmt: skip


def refused(entry: Any, **how: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check_entry(entry, "here", **how)
    assert str(error.value).startswith("here") and "\n" not in str(error.value)
    return str(error.value)


def test_a_state_needs_its_range_to_act_too() -> None:
    for name in ("min", "max"):
        entry = changed(lambda e, name=name: e["proprio"].pop(name))
        assert f"proprio.{name} is missing" in refused(entry, state=True)
        check_entry(entry, "here")


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_refused(kind: str) -> None:
    refused(changed(NONSENSE[kind]))


def test_sense_is_taken() -> None:
    check_entry(ENTRY, "here", state=True, whole=True)
    check_entry(changed(lambda e: [e["action"].pop(n) for n in ("min", "max", "mean", "std")]), "here")
    twice = changed(lambda e: e["action"].update({name: column * 2 for name, column in e["action"].items()}))
    check_entry(twice, "here")  # two arms
    constant = changed(lambda e: [e["action"][name].__setitem__(3, 0.0) for name in COLUMNS])
    check_entry(constant, "here")  # a dimension that never changes


def test_what_training_and_a_state_need_is_asked_for() -> None:
    assert "min is missing" in refused(changed(lambda e: e["action"].pop("min")), whole=True)
    assert "proprio.q01 is missing" in refused(changed(lambda e: e.pop("proprio")), state=True)
    assert "proprio" in refused(changed(lambda e: e["proprio"]["q01"].pop()), state=True)


def test_no_mask_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    check_entry(changed(lambda e: e["action"].pop("mask")), "here")
    assert "mask" in capsys.readouterr().err


def test_a_file_without_a_key_on_top_is_taken_under_the_asked_one(tmp_path: Path) -> None:
    (tmp_path / STATISTICS).write_text(json.dumps(ENTRY))
    assert load_statistics(tmp_path, "mine") == {"mine": ENTRY}
    found = load_statistics(tmp_path)
    assert found[statistics_key(found, None, tmp_path)] == ENTRY


def test_config_json_is_the_second_home(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"norm_stats": {"a": ENTRY, "b_no_noops": ENTRY}}))
    found = load_statistics(tmp_path)
    assert statistics_key(found, "b", tmp_path) == "b_no_noops" and statistics_key(found, "a_no_noops", tmp_path) == "a"
    with pytest.raises(ConfigError, match=r"--unnorm_key is needed.*a, b_no_noops"):
        statistics_key(found, None, tmp_path)
    with pytest.raises(ConfigError, match="--unnorm_key c is not there"):
        statistics_key(found, "c", tmp_path)
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(ConfigError, match="norm_stats"):
        load_statistics(tmp_path)
