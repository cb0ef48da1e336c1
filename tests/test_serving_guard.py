"""What a stranger, a careless client or a browser's page can't do to a server."""

import contextlib
import io
import json
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import json_numpy
import msgpack
import numpy as np
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from prismatic.bench.serve import attack
from prismatic.errors import ConfigError
from prismatic.serving import openvla
from prismatic.serving.codec import read_json, read_msgpack
from prismatic.serving.guard import KEY_VARIABLE, read_key
from prismatic.serving.observation import Limits, RequestError
from prismatic.serving.openpi import Openpi
from prismatic.serving.vla_eval import VlaEval
from tests.fake_policy import FakePolicy, picture
from tests.live_server import Live, body, fields, live, openpi

KEY = "a-key-of-more-than-sixteen-characters"
REQUESTS = 150  # bench.py serve has 10,000
TIME_LIMIT = 10.0  # s that a well-behaved client may wait
READ_SECONDS = 0.5
HEAD = b"POST /act HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    """With limits that a test can exceed."""
    limits = Limits(body=200_000, pixels=10_000, text=50, connections=64, read_seconds=READ_SECONDS)
    with live(FakePolicy(), limits=limits) as running:
        yield running


def refuses_a_socket(server: Live, path: str, status: str, **options: Any) -> None:
    with pytest.raises(InvalidStatus, match=status), connect(f"ws://127.0.0.1:{server.port}{path}", **options):
        pass


def test_other_machines_need_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    for own in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        assert read_key(None, own) is None
    for foreign in ("0.0.0.0", "::", "192.168.1.2", "robot.example"):
        with pytest.raises(ConfigError, match="api_key_file"):
            read_key(None, foreign)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert read_key(None, "0.0.0.0") == KEY
    file = tmp_path / "key"
    file.write_text(f"{KEY[::-1]}\n")
    assert read_key(file, "0.0.0.0") == KEY[::-1]
    for short in ("", "short", "ä" * 20):
        file.write_text(short)
        with pytest.raises(ConfigError, match="makes a key"):
            read_key(file, "127.0.0.1")
    with pytest.raises(ConfigError, match="can't be read"):
        read_key(tmp_path / "none", "127.0.0.1")


def test_only_the_key_opens_every_dialect() -> None:
    with live(FakePolicy(), key=KEY) as server:
        for path, status in {"/": 200, "/healthz": 200, "/health": 200, "/metadata": 401, "/metrics": 401}.items():
            assert server.get(path).status_code == status
        for headers in ({}, {"Authorization": f"Api-Key {KEY}x"}, {"Authorization": KEY}, {"X-API-Key": KEY[:-1]}):
            assert server.act(body(), **headers).status_code == 401
        for headers in ({"Authorization": f"Api-Key {KEY}"}, {"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
            assert server.act(body(), **headers).status_code == 200
        for path in ("/", "/vla-eval"):
            refuses_a_socket(server, path, "401")
        client = WebsocketClientPolicy("127.0.0.1", server.port, api_key=KEY)
        assert client.infer(openpi())["actions"].shape == (1, 7)


def test_a_browsers_foreign_page_gets_nothing(server: Live) -> None:
    assert server.act(body(), Origin=server.url).status_code == 200
    foreign = [("Origin", "http://evil.example"), ("Origin", "null"), ("Host", "evil.example")]
    for name, value in [*foreign, ("Host", "["), ("Origin", "http://[x")]:
        assert server.act(body(), **{name: value}).status_code == 403
    refuses_a_socket(server, "/", "403", origin="http://evil.example")
    page = server.get("/")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "http://" not in page.text and "https://" not in page.text


def test_too_much_is_refused_and_the_server_goes_on(server: Live) -> None:
    for data, sentence in [
        (json_numpy.dumps(fields() | {"image": picture(1, 110)}), "pixels"),
        (json_numpy.dumps(fields(words="go" * 26)), "characters"),
        ('{"state": [' + "1," * 50_000 + "1]}", "too many"),
        ((b"x" * 1000 for _ in range(300)), "more than"),  # no Content-Length
    ]:
        refused = server.act(data)
        assert refused.status_code == 413 and sentence in refused.json()["error"]
        assert refused.headers["Connection"] == "close"
    with connect(f"ws://127.0.0.1:{server.port}", max_size=None) as client:
        client.recv()
        time.sleep(2 * READ_SECONDS)  # saying nothing between messages is no offence
        with pytest.raises(ConnectionClosed, match="1009"):
            client.send(b"x" * 200_001)
            client.recv()
    assert server.act(body()).status_code == 200


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@pytest.mark.parametrize(
    ("first", "more", "then", "answer"),
    [
        (b"", b"", b"", b""),
        (HEAD, b"X", b"", b""),
        (HEAD + b"Content-Length: 1000\r\n\r\n", b" ", b"", b"408"),
        (HEAD + b"Content-Length: 2\r\n\r\n{}" + HEAD, b"X", b"", b"400"),  # a second request of the same connection
        (UPGRADE, b"x", b"\x82\xfe\x10\x00", b"101"),  # of a message of 4,096 bytes
    ],
)
def test_a_request_must_arrive_in_time(server: Live, first: bytes, more: bytes, then: bytes, answer: bytes) -> None:
    """The server closes on a client that dribbles."""
    start, said = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", server.port)) as slow, contextlib.suppress(ConnectionError):
        slow.settimeout(0.05)
        slow.sendall(first)
        time.sleep(0.1 if then else 0)
        slow.sendall(then)
        while time.monotonic() < start + 5:
            with contextlib.suppress(TimeoutError):
                slow.sendall(more)
                if not (part := slow.recv(1000)):
                    break
                said += part
    assert 0.3 < time.monotonic() - start < 4 and answer in said and b"masking" not in said


def test_connections_are_limited() -> None:
    with live(FakePolicy(), limits=Limits(connections=4)) as server:
        taken = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        time.sleep(0.2)
        answer = server.get("/healthz")
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
        for one in taken:
            one.close()
        time.sleep(0.2)
        assert server.get("/healthz").status_code == 200


def picture_bomb(kind: str) -> bytes:
    """4 million pixels in a few kB: below what Pillow itself refuses."""
    stream = io.BytesIO()
    Image.new("1", (2000, 2000)).save(stream, kind)
    return stream.getvalue()


def pack(content: object) -> bytes:
    return bytes(msgpack.packb(content) or b"")


def array(**changes: object) -> bytes:
    return json.dumps({"image": {"__numpy__": "AAAA", "dtype": "|u1", "shape": [1, 1, 3]} | changes}).encode()


def image_map(**changes: object) -> bytes:
    return pack({"__image__": True, "format": "png", "data": b"", "shape": [1, 1, 3]} | changes)


def every_field(data: bytes, limits: Limits) -> dict[str, Any]:
    return read_json(data, lambda name: True)


LIES: dict[Callable[[bytes, Limits], Any], list[tuple[bytes, str]]] = {
    every_field: [
        (array(dtype="|O"), "plain number"),
        (array(dtype="(1000000000,)u1"), "plain number"),
        (array(shape=[-1, 3]), "whole numbers"),
        (array(shape=[2**62, 2]), "don't fit"),
        (array(__numpy__="?"), "base64"),
        (b'{"image": {"a": 1}}', "__numpy__"),
        (b"[" * 100_000, "no JSON"),
        (b'{"image":' + b"[" * 100_000, "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"3", "no JSON"),
        (b'{"image": {"__numpy__": "", "dtype": "|u1", "shape": [0, 9223372036854775808, 3]}}', "shape"),
    ],
    read_msgpack: [
        (pack({b"__ndarray__": True, b"data": pickle.dumps([1]), b"dtype": "|O", b"shape": [1]}), "plain number"),
        (pack({"__ndarray__": [1], "data": {}, "dtype": "|u1", "shape": [4]}), "bytes as data"),
        (pack({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}), "number"),
        (image_map(data=picture_bomb("png")), "of at most"),
        (image_map(data=picture_bomb("gif")), "decoded"),
        (image_map(data=b"\x89PNG\r\n\x1a\n garbage"), "decoded"),
        (image_map(format="bmp"), "png, jpeg or raw"),
        (b"\x91" * 5000, "valid msgpack"),
        (b"\xdd\xff\xff\xff\xff", "valid msgpack"),
        (pack([[[]] * 1999 for _ in range(3)]), "too many"),
        (pack(msgpack.ExtType(5, b"x" * 16)), "valid msgpack"),
        (b"\x81\x90\x01", "valid msgpack"),  # a list as a key
        (b"", "valid msgpack"),
    ],
}


@pytest.mark.parametrize("read", LIES)
def test_a_message_that_lies_is_refused(read: Callable[[bytes, Limits], Any]) -> None:
    for message, sentence in LIES[read]:
        with pytest.raises(RequestError, match=sentence):
            read(message, Limits())


def test_arrays_survive() -> None:
    for given_array in (picture(1), np.linspace(0, 1, 8), np.ones((1, 2), np.float32), np.zeros((0, 3), np.int64)):
        found = every_field(json_numpy.dumps({"a": given_array}).encode(), Limits())["a"]
        assert found.dtype == given_array.dtype and np.array_equal(found, given_array)


NAMES = [
    "image", "full_image", "wrist_image", "instruction", "state", "unnorm_key", "session", "encoded", "type", "payload", "images",
    "agentview", "task_description", "__numpy__", "__ndarray__", "__image__", "__npgeneric__", "format", "states", "seq", "data",
    "dtype", "shape", "observation/image", "prompt",
]  # fmt: skip
keys = st.sampled_from(NAMES)
leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20)
leaves |= st.sampled_from(["|u1", "<f4", "|O", "png", "jpeg", "raw", "AAAA", "hello", "observation", "go"])


def trees(leaf: st.SearchStrategy[Any], key: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(key, inner, max_size=5), max_leaves=15
    )


quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
packed = trees(leaves | st.binary(max_size=40), keys | keys.map(str.encode)).map(pack)


def reads_or_refuses(read: Callable[[bytes, Limits], Any], data: bytes) -> None:
    try:
        asked = read(data, Limits(pixels=4096))
        assert asked is None or asked.frame.ndim == 3
    except RequestError as error:
        assert 400 <= error.status < 500 and "\n" not in str(error)


@quick
@given(data=st.binary(max_size=200) | trees(leaves, keys).map(lambda tree: json.dumps(tree).encode()))
def test_any_body_of_act_is_a_request_or_an_error(data: bytes) -> None:
    reads_or_refuses(lambda data, limits: openvla.read(openvla.decode(data)[0], limits), data)


@quick
@given(data=st.binary(max_size=200) | packed)
@pytest.mark.parametrize("dialect", [Openpi, VlaEval])
def test_any_message_is_an_observation_or_an_error(dialect: type[Openpi | VlaEval], data: bytes) -> None:
    reads_or_refuses(lambda data, limits: dialect("client").read(read_msgpack(data, limits), limits), data)


def test_hostile_clients_stop_nobody() -> None:
    """Beside them a well-behaved client asks on and on, and no answer is late."""
    policy = FakePolicy()
    with live(policy) as server:
        waits = attack(policy, server.port, REQUESTS)
        metrics = server.get("/metrics").text
    assert len(waits) > 3 and max(waits) < TIME_LIMIT
    assert 'status="400"' in metrics and 'status="500"' not in metrics


def test_no_method_of_any_path_is_an_error_of_the_servers(server: Live) -> None:
    for path in ("/", "/act", "/metadata", "/../etc/passwd", "/%00", "/" + "a" * 9000, "//x"):
        for method in ("GET", "PUT", "DELETE", "OPTIONS", "TRACE", "POST"):
            assert requests.request(method, server.url + path, data=b"{}", timeout=TIME_LIMIT).status_code < 500
