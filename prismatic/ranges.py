"""Kinds of numbers and names with their limits, for fields of configurations (flags) and of records (JSON).

A limit stands on its field, `batch_size: Positive = 16`; `checked` looks at all flags of a script before anything starts, `read_record` at the
fields of a file. Surprising: a float is finite everywhere, without saying so.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import msgspec
from msgspec import Meta

from prismatic.errors import ConfigError

Count = Annotated[int, Meta(ge=0, lt=2**53)]
Positive = Annotated[int, Meta(ge=1, lt=2**53)]
Few = Annotated[int, Meta(ge=1, le=256)]  # layers, actions of a chunk
Seed = Annotated[int, Meta(ge=0, lt=2**32)]  # what numpy's and LIBERO's generators take
Rank = Annotated[int, Meta(ge=1, le=2**14)]  # of an adapter
BatchSize = Annotated[int, Meta(ge=1, le=2**16)]
Processes = Annotated[int, Meta(ge=0, le=1024)]  # beside this one
Workers = Annotated[int, Meta(ge=1, le=1024)]
Images = Annotated[int, Meta(ge=1, le=2)]  # of one moment: the camera in front, and the one at the wrist
ActionHead = Literal["tokens", "parallel", "l1"]  # how hidden states become actions, see models/vla.py
Share = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
NonNegative = Annotated[float, Meta(ge=0)]
LearningRate = Annotated[float, Meta(gt=0, lt=1)]

SMALLEST = 2.0**-126  # above zero, in float32
NAME_BYTES = 255  # the longest name that file systems take
PATH_BYTES = 4096
TEXTS = ("--data_keys", "--dataset_name")  # flags that are no path, long or with a ~ as they may be
NAME_RULE = "a name without / and \\, not beginning with a dot, of at most 100 characters"
FolderName = Annotated[str, Meta(pattern=r"\A(?!\.)[^/\\\x00-\x1f\x7f\ud800-\udfff]{0,100}\Z")]
# for msgspec's kinds
WORDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "array": "a list"}

Config = TypeVar("Config")


def command_line(kind: type[Config], description: str | None, arguments: Sequence[str] | None = None) -> Config:
    """A script's configuration, not checked yet; arguments: None are this process's."""
    import tyro  # here: bench.py gpu runs where it is not installed

    how = (tyro.conf.FlagConversionOff,)  # a switch takes True or False, as in the original's scripts
    return tyro.cli(kind, args=arguments, description=description, config=how, use_underscores=True)


def checked(flags: Config) -> Config:
    """A script's configuration, a dataclass, with ~ expanded in every path; ConfigError that names the first flag outside its limits."""
    hints = get_type_hints(type(flags), include_extras=True)
    values = {}
    for field in dataclasses.fields(flags):  # type: ignore[arg-type]
        value, name = getattr(flags, field.name), f"--{field.name}"
        try:
            value = msgspec.convert(value, hints[field.name], dec_hook=_path)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{name} {value!r}: {wanted(str(error).partition(' - at ')[0])}") from None
        if value == "" and field.default != "":
            raise ConfigError(f"{name} is empty: give a value, or leave the flag out")
        values[field.name] = _checked_value(value, name)
    return dataclasses.replace(flags, **values)  # type: ignore[type-var]


def wanted(message: str) -> str:
    """What msgspec says about a value, as the end of a sentence for a person."""
    if "matching regex" in message:
        return f"give {NAME_RULE}"
    if message.startswith("Invalid enum value"):
        return "not one of the values that --help lists"
    for kind, word in WORDS.items():
        message = message.replace(f"`{kind}`", word)
    return message.replace("Expected", "expected", 1).replace("`", "")


def check_folder_name(name: str, made_of: str) -> str:
    """The name, which is made of `made_of`; ConfigError unless it is that of one folder, of a length that every file system takes."""
    if not name or name.startswith(".") or any(c in "/\\" or ord(c) < ord(" ") for c in name):
        raise ConfigError(f"{made_of}: {name!r} can't be a folder: give {NAME_RULE}")
    if len(_utf8(name, made_of)) > NAME_BYTES - len(".unfinished-.partial"):
        raise ConfigError(
            f"{made_of}: {name[:40]!r}… is too long for a folder's name ({len(name)} characters): shorten it"
        )
    return name


def expanded(path: str | Path, name: str = "the path") -> str:
    """A path or hub id with ~ expanded; ConfigError, which begins with name, where there is no such home, or no file system takes the path."""
    return str(_checked_value(str(path), name))


def _path(kind: type, value: Any) -> Any:
    """msgspec's hook for the types that it doesn't know, of which there is one: a text is taken for a Path."""
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    raise msgspec.ValidationError(f"Expected `{kind.__name__}`, got `{type(value).__name__}`")


def _checked_value(value: Any, name: str) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_checked_value(item, name) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} {value}: give a finite number")
    if isinstance(value, float) and 0 < abs(value) < SMALLEST:
        raise ConfigError(f"{name} {value}: too small for float32: give 0, or a larger number")
    if isinstance(value, str | Path):
        text = str(value)
        encoded = _utf8(text, name)
        if b"\0" in encoded:
            raise ConfigError(f"{name} {text!r} holds a NUL character: leave it out")
        is_path = name not in TEXTS
        if is_path and (len(encoded) > PATH_BYTES or any(len(part) > NAME_BYTES for part in encoded.split(b"/"))):
            raise ConfigError(f"{name} {text[:40]!r}… is too long for a path ({len(text)} characters): shorten it")
        if is_path and text.startswith("~"):
            try:
                return type(value)(Path(text).expanduser())
            except RuntimeError:
                raise ConfigError(f"{name} {text}: there is no such home folder: write the path in full") from None
    return value


def _utf8(text: str, name: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} {text!r} is not valid UTF-8: give it in characters of Unicode") from None
