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
    "count": 3, "nested": {"share": 0.5, "words": ["a"]}, "means": [[1, 2, 3.5]], "key": None, "flag": False,
}  # fmt: skip


def refused(content: bytes | str) -> str:
    """The sentence. Anything else that is raised, or nothing, fails the test."""
    with pytest.raises(ConfigError) as error:
        parse_record(content, Example, "here.json")
    assert str(error.value).startswith("here.json") and "\n" not in str(error.value)
    return str(error.value)


def test_a_record_comes_out_as_it_went_in(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(GOOD))
    record = read_record(path, Example)
    assert record == Example(3, {"share": 0.5, "words": ["a"]}, ((1.0, 2.0, 3.5),), None, False)
    assert read_object(path) == GOOD
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"count.*: begin again$"):
        read_record(path, Example, way_out="begin again")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_sentence(content: bytes) -> None:
    refused(content)


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "count": (0, -1, True, 3.5, "3", None, 10**400), "means": ([[1, 2]], [[1, 2, "x"]], 3), "flag": (1, None), "key": (1,),
        "nested": ({}, {"share": 1.5, "words": []}, {"share": 0.5, "words": [3]}),
    }.items(),
)  # fmt: skip
def test_a_field_outside_its_limits_is_named(field: str, values: tuple[Any, ...]) -> None:
    for value in values:
        assert field in refused(json.dumps(GOOD | {field: value})) or value == 10**400


def test_what_is_no_json_is_refused() -> None:
    for content in (
        "\ufeff{}",
        '{"count": 1e999}',
        "[" * 10**5,
        '{"x": ' + "[" * 10**5 + "]" * 10**5 + "}",
        '{"key": "\\ud800"}',
    ):
        refused(content)
    assert "NaN" in refused('{"count": NaN}') and "Infinity" in refused('{"count": Infinity}')


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
    pointer = tmp_path / "config.json"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ConfigError, match=r"config\.json is a pointer of Git LFS.*`git lfs pull`"):
        read_bytes(pointer)
