"""What a stranger, a careless client or a browser's page can't do to a server."""

import io
import json
import pickle
import socket
import time
from pathlib import Path

import json_numpy
import msgpack
import numpy as np
import pytest
import requests
import websockets.exceptions
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from PIL import Image
from websockets.sync.client import connect

from prismatic.errors import ConfigError
from prismatic.serving.codec import read_json, read_msgpack
from prismatic.serving.guard import KEY_VARIABLE, read_key
from prismatic.serving.observation import Limits, RequestError
from tests.fake_policy import FakePolicy, picture
from tests.live_server import live

KEY = "a-key-of-more-than-sixteen-characters"
BODY = json_numpy.dumps({"image": picture(1), "wrist_image": picture(2), "instruction": "go"})
OBSERVATION = {"observation/image": picture(1), "observation/wrist_image": picture(2), "prompt": "go"}


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
        for path in ("/", "/healthz", "/health"):
            assert requests.get(server.url + path, timeout=10).status_code == 200
        for path in ("/metadata", "/metrics", "/config", "/example"):
            assert requests.get(server.url + path, timeout=10).status_code == 401
        for headers in ({}, {"Authorization": f"Api-Key {KEY}x"}, {"Authorization": KEY}, {"X-API-Key": KEY[:-1]}):
            assert requests.post(server.url + "/act", data=BODY, headers=headers, timeout=10).status_code == 401
        for headers in ({"Authorization": f"Api-Key {KEY}"}, {"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
            assert requests.post(server.url + "/act", data=BODY, headers=headers, timeout=10).status_code == 200
        for path in ("/", "/vla-eval"):
            with (
                pytest.raises(websockets.exceptions.InvalidStatus, match="401"),
                connect(f"ws://127.0.0.1:{server.port}{path}"),
            ):
                pass
        client = WebsocketClientPolicy("127.0.0.1", server.port, api_key=KEY)
        assert client.infer(OBSERVATION)["actions"].shape == (1, 7)


def test_a_browsers_foreign_page_gets_nothing() -> None:
    with live(FakePolicy()) as server:
        own = {"Origin": server.url}
        assert requests.post(server.url + "/act", data=BODY, headers=own, timeout=10).status_code == 200
        for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
            assert requests.post(server.url + "/act", data=BODY, headers=headers, timeout=10).status_code == 403
        with (
            pytest.raises(websockets.exceptions.InvalidStatus, match="403"),
            connect(f"ws://127.0.0.1:{server.port}", origin="http://evil.example"),  # type: ignore[arg-type]
        ):
            pass
        for headers in ({"Host": "["}, {"Origin": "http://[x"}):  # no addresses
            assert requests.post(server.url + "/act", data=BODY, headers=headers, timeout=10).status_code == 403
        page = requests.get(server.url, timeout=10)
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert "http://" not in page.text.replace("http://www.w3.org", "") and "https://" not in page.text


def test_too_much_is_refused_and_the_server_goes_on() -> None:
    limits = Limits(body=200_000, pixels=10_000, text=50, read_seconds=0.5)
    with live(FakePolicy(), limits=limits) as server:

        def post(data: bytes | str) -> requests.Response:
            return requests.post(server.url + "/act", data=data, timeout=10)

        big = json_numpy.dumps({"image": picture(1, 110), "wrist_image": picture(2), "instruction": "go"})
        long = json_numpy.dumps({"image": picture(1), "wrist_image": picture(2), "instruction": "go" * 26})
        assert post(big).status_code == 413 and "pixels" in post(big).json()["error"]
        assert post(long).status_code == 413 and "characters" in post(long).json()["error"]
        assert post("[" * 100_000).status_code == 413
        assert post('{"state": [' + "1," * 50_000 + "1]}").status_code == 413
        assert post(b"x" * 200_001).status_code == 413

        def chunks() -> object:  # no Content-Length
            for _ in range(300):
                yield b"x" * 1000

        refused = requests.post(server.url + "/act", data=chunks(), timeout=10)  # type: ignore[arg-type]
        assert refused.status_code == 413 and refused.headers["Connection"] == "close"
        with connect(f"ws://127.0.0.1:{server.port}", max_size=None) as client:
            client.recv()
            with pytest.raises(websockets.exceptions.ConnectionClosed, match="1009"):
                client.send(b"x" * 200_001)
                client.recv()
        assert post(BODY).status_code == 200


def test_a_request_must_arrive_in_time() -> None:
    with live(FakePolicy(), limits=Limits(read_seconds=0.3)) as server:

        def closed_after(first: bytes, more: bytes, then: bytes = b"") -> tuple[float, bytes]:
            """Seconds until the server closes on a client that dribbles, and what it said."""
            start, said = time.monotonic(), b""
            with socket.create_connection(("127.0.0.1", server.port)) as slow:
                slow.settimeout(0.05)
                slow.sendall(first)
                time.sleep(0.1 if then else 0)
                slow.sendall(then)
                while time.monotonic() < start + 5:
                    try:
                        slow.sendall(more)
                        part = slow.recv(1000)
                    except TimeoutError:
                        continue
                    except OSError:
                        break
                    said += part
                    if not part:
                        break
            return time.monotonic() - start, said

        head = b"POST /act HTTP/1.1\r\nHost: localhost\r\n"
        assert closed_after(b"", b"")[0] < 3
        assert closed_after(head, b"X")[0] < 3
        seconds, said = closed_after(head + b"Content-Length: 1000\r\n\r\n", b" ")
        assert seconds < 3 and b"408" in said
        whole = head + b"Content-Length: 2\r\n\r\n{}"
        assert closed_after(whole + head, b"X")[0] < 3  # a second request of the same connection
        upgrade = (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        seconds, said = closed_after(upgrade, b"x", then=b"\x82\xfe\x10\x00")  # of a message of 4,096 bytes
        assert 0.3 < seconds < 3 and b"101" in said and b"masking" not in said
        with connect(f"ws://127.0.0.1:{server.port}") as patient:  # saying nothing between messages is no offence
            patient.recv()
            time.sleep(0.6)
            patient.ping().wait(5)
        assert requests.post(server.url + "/act", data=BODY, timeout=10).status_code == 200


def test_connections_are_limited() -> None:
    with live(FakePolicy(), limits=Limits(connections=4)) as server:
        taken = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        time.sleep(0.2)
        answer = requests.get(server.url + "/healthz", timeout=10)
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
        for one in taken:
            one.close()
        time.sleep(0.2)
        assert requests.get(server.url + "/healthz", timeout=10).status_code == 200


def picture_bomb(kind: str) -> bytes:
    """4 million pixels in a few kB: below what Pillow itself refuses."""
    stream = io.BytesIO()
    Image.new("1", (2000, 2000)).save(stream, kind)
    return stream.getvalue()


def pack(content: object) -> bytes:
    return bytes(msgpack.packb(content) or b"")


def image_map(**changes: object) -> bytes:
    return pack({"__image__": True, "format": "png", "data": b"", "shape": [1, 1, 3]} | changes)


ARRAY = {"__numpy__": "AAAA", "dtype": "|u1", "shape": [1, 1, 3]}


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (json.dumps(ARRAY | {"dtype": "|O"}), "plain number"),
        (json.dumps(ARRAY | {"dtype": [["a", "|u1"]]}), "plain number"),
        (json.dumps(ARRAY | {"dtype": "(1000000000,)u1"}), "plain number"),
        (json.dumps(ARRAY | {"shape": [-1, 3]}), "whole numbers"),
        (json.dumps(ARRAY | {"shape": [1e9]}), "whole numbers"),
        (json.dumps(ARRAY | {"shape": [2**62, 2]}), "don't fit"),
        (json.dumps(ARRAY | {"__numpy__": "?"}), "base64"),
        (json.dumps(ARRAY | {"__numpy__": 3}), "base64"),
        ("[" * 1999, "no valid JSON"),
        (b"\xff\xfe\x00", "no valid JSON"),
        ("9" * 5000, "no valid JSON"),
    ],
)
def test_json_that_lies(message: str | bytes, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        read_json(message.encode() if isinstance(message, str) else message, Limits())


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (
            msgpack.packb({b"__ndarray__": True, b"data": pickle.dumps([1]), b"dtype": "|O", b"shape": [1]}),
            "plain number",
        ),
        (pack({"__ndarray__": True, "data": b"123", "dtype": "|u1", "shape": [4]}), "don't fit"),
        (pack({"__ndarray__": [1], "data": {}, "dtype": "|u1", "shape": [4]}), "bytes as data"),
        (pack({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}), "number"),
        (image_map(data=picture_bomb("png")), "of at most"),
        (image_map(data=picture_bomb("gif")), "decoded"),
        (image_map(data=b"\x89PNG\r\n\x1a\n garbage"), "decoded"),
        (image_map(format="bmp"), "png, jpeg or raw"),
        (image_map(data="text"), "png, jpeg or raw"),
        (b"\x91" * 5000, "valid msgpack"),
        (b"\xdd\xff\xff\xff\xff", "valid msgpack"),
        (pack([[[]] * 1999 for _ in range(3)]), "too many"),
        (pack({"a": 1})[:-1], "valid msgpack"),
        (pack(msgpack.ExtType(5, b"x" * 16)), "valid msgpack"),
        (b"\x81\x90\x01", "valid msgpack"),  # a list as a key
        (b"", "valid msgpack"),
    ],
)
def test_msgpack_that_lies(message: bytes, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        read_msgpack(message, Limits())


def test_arrays_survive_both_ways() -> None:
    for array in (picture(1), np.linspace(0, 1, 8), np.ones((1, 2), np.float32), np.zeros((0, 3), np.int64)):
        found = read_json(json_numpy.dumps({"a": array}).encode(), Limits())["a"]
        assert found.dtype == array.dtype and np.array_equal(found, array)
