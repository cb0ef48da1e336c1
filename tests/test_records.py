"""A JSON file gives a record or one sentence, whatever it holds and whatever it is."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismatic.errors import ConfigError
from prismatic.ranges import Positive, Share
from prismatic.records import LARGEST, parse_record, read_bytes, read_object, read_record


class Nested(TypedDict):
    """A record in a record."""

    share: Share
    words: list[str]


@dataclass(frozen=True)
class Example:
    """Every kind of field that the project's records have."""

    count: Positive
    nested: Nested
    means: tuple[tuple[float, float, float], ...] = ()
    key: str | None = None
    flag: bool = True


GOOD: dict[str, Any] = {
    "count": 3,
    "nested": {"share": 0.5, "words": ["a"]},
    "means": [[1, 2, 3.5]],
    "key": None,
    "flag": False,
}


def one_sentence(content: bytes | str, kind: type = Example) -> str | None:
    """None where it is a record; the sentence that refuses it otherwise. Anything else that is raised fails the test."""
    try:
        parse_record(content, kind, "here.json")
    except ConfigError as error:
        assert str(error).startswith("here.json") and "\n" not in str(error)
        return str(error)
    return None


def test_a_record_comes_out_as_it_went_in(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(GOOD))
    record = read_record(path, Example)
    assert record == Example(3, {"share": 0.5, "words": ["a"]}, ((1.0, 2.0, 3.5),), None, False)
    assert read_object(path) == GOOD


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_sentence(content: bytes) -> None:
    assert one_sentence(content)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 0), ("count", -1), ("count", True), ("count", 3.5), ("count", "3"), ("count", 10**400), ("count", None),
        ("means", [[1, 2]]), ("means", [[1, 2, "x"]]), ("means", 3), ("flag", 1), ("flag", None), ("key", 1),
        ("nested", {}), ("nested", {"share": 1.5, "words": []}), ("nested", {"share": 0.5, "words": [3]}),
    ],
)  # fmt: skip
def test_a_field_outside_its_limits_is_named(field: str, value: Any) -> None:
    sentence = one_sentence(json.dumps(GOOD | {field: value}))
    assert sentence and (field in sentence or value == 10**400)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "\ufeff{}", '{"count": NaN}', '{"count": Infinity}', '{"count": 1e999}', "[" * 10**5, '{"a":' * 10**5,
     '{"x": ' + "[" * 10**5 + "]" * 10**5 + "}", '{"key": "\\ud800"}', b"\xff\xfe"],
    ids=lambda text: repr(text[:16]),
)  # fmt: skip
def test_what_is_no_json_is_refused(content: str | bytes) -> None:
    assert one_sentence(content)


def test_nan_is_called_by_its_name() -> None:
    assert "NaN" in (one_sentence('{"count": NaN}') or "")


def test_only_a_regular_file_of_bounded_size_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge.json").touch()
    os.truncate(tmp_path / "huge.json", LARGEST + 1)  # sparse
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    begun = time.monotonic()
    for path in (tmp_path / "pipe", tmp_path / "huge.json", tmp_path / "loop", tmp_path, tmp_path / "none",
                 Path("/dev/zero"), Path("x" * 400), Path("a\0b")):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            read_bytes(path)
        assert "\n" not in str(error.value)
    assert time.monotonic() - begun < 1


def test_the_way_out_ends_the_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"count.*: begin again$"):
        read_record(tmp_path / "a.json", Example, way_out="begin again")
