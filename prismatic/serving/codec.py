"""Bytes to arrays and back, for json-numpy and the two msgpack conventions, without pickle and within limits.

In: a body or a message of a client, at most `Limits.body` long. Out: maps, lists, text, numbers and numpy arrays of plain numbers.
Surprising: openpi's array maps have bytes keys (`b"__ndarray__"`), vla-eval's string keys, and vla-eval sends images as PNG.
"""

import base64
import io
import math
import re
from collections.abc import Callable
from typing import Any

import msgpack
import msgspec
import numpy as np
from PIL import Image

from prismatic.serving.observation import Limits, RequestError, check_size

DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")  # no objects, no structures, no strings
MOST_CONTAINERS = 2000  # lists and maps of a message: a few bytes each on the wire, a hundred in memory
MOST_ITEMS = 20_000  # entries of all of them together


class JsonArray(msgspec.Struct):
    """An array as json-numpy writes it; msgspec decodes the base64."""

    data: bytes = msgspec.field(name="__numpy__")
    dtype: str
    shape: list[int]


_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_value = msgspec.json.Decoder(JsonArray | str | float | list[float] | None)


def read_json(body: bytes, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The wanted fields of a JSON object: text, numbers, flat lists of numbers, and json-numpy's arrays. What is not wanted is not built."""
    if body.count(b",") > MOST_ITEMS:
        raise RequestError("the body has too many lists and maps: send arrays as json-numpy encodes them", 413)
    name = "the body"
    try:
        found, fields = {}, _fields.decode(body)
        for name in filter(wanted, fields):
            value = _value.decode(fields[name])
            found[name] = _array(value.data, value.dtype, value.shape) if isinstance(value, JsonArray) else value
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"{name[:40]} is no JSON that this server takes: {_first_line(error)}") from None
    return found


def json_array(array: np.ndarray) -> dict[str, Any]:
    """An array as json-numpy writes it."""
    data = base64.b64encode(np.ascontiguousarray(array).data).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def read_msgpack(data: bytes, limits: Limits) -> Any:
    """msgpack with openpi's or vla-eval's arrays and vla-eval's images."""
    counted = [0]

    def count(items: Any) -> Any:
        counted[0] += 1
        if counted[0] > MOST_CONTAINERS:
            raise RequestError("the message has too many lists and maps", 413)
        return items

    try:
        return msgpack.unpackb(
            data,
            object_hook=lambda found: _msgpack_array(count(found), limits),
            list_hook=count,
            strict_map_key=False,
            max_array_len=MOST_CONTAINERS,
            max_map_len=MOST_CONTAINERS,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:  # TypeError: an unhashable key
        raise RequestError(f"the message is no valid msgpack: {_first_line(error)}") from None


def write_msgpack(content: Any, array: Callable[[np.ndarray], dict]) -> bytes:
    """array: how the dialect writes one."""
    return bytes(msgpack.packb(content, default=array) or b"")


def string_keys(array: np.ndarray) -> dict[str, Any]:
    """An array as vla-eval's harness reads it."""
    return {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": array.shape}


def bytes_keys(array: np.ndarray) -> dict[bytes, Any]:
    """An array as openpi's clients read it."""
    return {name.encode(): value for name, value in string_keys(array).items()}


def _msgpack_array(found: dict[Any, Any], limits: Limits) -> Any:
    def field(name: str) -> Any:
        return found.get(name, found.get(name.encode()))

    if field("__npgeneric__"):
        if not isinstance(field("data"), (bool, int, float)):
            raise RequestError("a numpy scalar must hold a number")
        return field("data")
    if field("__ndarray__") or (field("__image__") and field("format") == "raw"):
        return _array(field("data"), field("dtype"), field("shape"))
    return _image(field("data"), field("format"), limits) if field("__image__") else found


def _array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    """An array of plain numbers from its bytes."""
    if isinstance(dtype, bytes):
        dtype = dtype.decode("latin-1")
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise RequestError(f"an array's dtype must be a plain number's such as |u1 or <f4, it is {str(dtype)[:40]!r}")
    whole = isinstance(shape, (list, tuple)) and len(shape) <= 4 and all(type(n) is int and n >= 0 for n in shape)
    if not isinstance(data, bytes) or not whole:
        raise RequestError("an array needs its bytes as data and at most 4 whole numbers as shape")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(data):
        raise RequestError(f"an array's shape {list(shape)} and dtype {dtype} don't fit its {len(data):,} bytes")
    try:
        return np.frombuffer(data, dtype).reshape(shape)
    except ValueError as error:  # of no items, but with a side that numpy has no number for
        raise RequestError(f"an array's shape {str(shape)[:60]} is none: {_first_line(error)}") from None


def _image(data: Any, kind: Any, limits: Limits) -> np.ndarray:
    """vla-eval's compressed image; its size is looked at before it is decoded."""
    if not isinstance(data, bytes) or kind not in ("png", "jpeg"):
        raise RequestError("an image needs its bytes as data and png, jpeg or raw as format")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as opened:
            check_size(opened.height, opened.width, "the image", limits)
            if opened.mode != "RGB":
                raise RequestError(f"an image must be RGB with 8 bits a channel, it is {opened.mode}")
            return np.asarray(opened)
    except RequestError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, zlib's and struct's own
        raise RequestError(f"an image can't be decoded: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
