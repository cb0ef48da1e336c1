"""Whatever arrives, a reader answers or raises RequestError, and the server goes on answering the others."""

import json
import os
import random
import socket
import threading
import time
from typing import Any

import json_numpy
import msgpack
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from prismatic.serving.codec import read_msgpack
from prismatic.serving.observation import Limits, RequestError, read_observation
from prismatic.serving.openvla import ActRequest
from prismatic.serving.vla_eval import read as read_vla_eval
from tests.fake_policy import FakePolicy, picture
from tests.live_server import Live, live

REQUESTS = int(os.environ.get("HOSTILE_REQUESTS", "400"))  # docs/serve.md says what 10,000 gave
TIME_LIMIT = 10.0  # s that a well-behaved client may wait
GOOD = {"image": picture(1), "wrist_image": picture(2), "instruction": "go", "state": [0.0] * 8}
LIMITS = Limits(pixels=4096)


def pack(content: Any) -> bytes:
    return bytes(msgpack.packb(content) or b"")


keys = st.sampled_from(
    ["image", "full_image", "wrist_image", "instruction", "state", "unnorm_key", "session", "encoded", "images", "states",
     "agentview", "task_description", "type", "payload", "seq", "__numpy__", "__ndarray__", "__image__", "__npgeneric__", "data", "dtype",
     "shape", "format", "observation/image", "prompt"]
)  # fmt: skip
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["|u1", "<f4", "|O", "png", "jpeg", "raw", "AAAA", "hello", "observation", "go"])
)
trees: st.SearchStrategy[Any] = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5), max_leaves=15
)
binary_trees = st.recursive(
    leaves | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys | keys.map(str.encode), inner, max_size=5),
    max_leaves=15,
)
quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(body=st.binary(max_size=200) | trees.map(lambda tree: json.dumps(tree).encode()))
def test_any_body_of_act_is_a_request_or_an_error(body: bytes) -> None:
    try:
        assert ActRequest(body, LIMITS).observation.frame.ndim == 3
    except RequestError as error:
        assert 400 <= error.status < 500 and "\n" not in str(error)


@quick
@given(data=st.binary(max_size=200) | binary_trees.map(pack))
def test_any_message_is_an_observation_or_an_error(data: bytes) -> None:
    try:
        message = read_msgpack(data, LIMITS)
        for reader in (read_observation, read_vla_eval):
            assert not isinstance(message, dict) or reader(message, LIMITS).frame.ndim == 3
    except RequestError as error:
        assert 400 <= error.status < 500 and "\n" not in str(error)


def damaged(generator: random.Random, whole: bytes) -> bytes:
    """A message cut short, with bytes changed, or noise."""
    kind = generator.randrange(4)
    if kind == 0:
        return whole[: generator.randrange(len(whole))]
    if kind == 1:
        return generator.randbytes(generator.randrange(300))
    changed = bytearray(whole)
    for _ in range(generator.randrange(1, 20)):
        changed[generator.randrange(min(len(changed), 400) if kind == 2 else len(changed))] = generator.randrange(256)
    return bytes(changed)


def attack(server: Live, number: int, generator: random.Random) -> None:
    """One hostile client of a random kind; it may be answered or dropped, as the server likes."""
    json_body = json_numpy.dumps(GOOD).encode()
    message = pack({"observation/image": [1], "prompt": "go", "type": "observation", "payload": {}, "seq": number})
    kind = number % 5
    if kind == 0:
        answer = requests.post(server.url + "/act", data=damaged(generator, json_body), timeout=TIME_LIMIT)
        assert answer.status_code in (200, 400, 413), answer.text  # a changed pixel is still a picture
    elif kind == 1:
        with socket.create_connection(("127.0.0.1", server.port), timeout=TIME_LIMIT) as raw:
            head = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n"
            raw.sendall(damaged(generator, head + json_body))
            if generator.random() < 0.5:
                raw.settimeout(0.02)
                raw.recv(1000)
    elif kind == 2:
        path = generator.choice(
            ["/", "/act", "/metadata", "/metrics", "/../etc/passwd", "/%00", "/" + "a" * 9000, "//x"]
        )
        method = generator.choice(["GET", "PUT", "DELETE", "OPTIONS", "TRACE", "POST"])
        requests.request(method, server.url + path, data=b"{}", timeout=TIME_LIMIT)
    else:
        with connect(f"ws://127.0.0.1:{server.port}{generator.choice(['/', '/vla-eval'])}", max_size=None) as client:
            for _ in range(3):
                noise = damaged(generator, message)
                client.send(noise if generator.random() < 0.8 else noise.decode("latin-1"))
            if generator.random() < 0.5:
                client.recv(timeout=TIME_LIMIT)


def test_hostile_clients_stop_nobody() -> None:
    """Beside them a well-behaved client asks on and on, and no answer is late."""
    generator, waits, stop = random.Random(0), [], threading.Event()
    policy = FakePolicy(uses_state=True)

    with live(policy, limits=Limits(read_seconds=2, connections=64)) as server:

        def ask() -> None:
            start = time.monotonic()
            answer = requests.post(server.url + "/act", data=json_numpy.dumps(GOOD), timeout=TIME_LIMIT)
            assert answer.status_code == 200, answer.text
            waits.append(time.monotonic() - start)

        def behave() -> None:
            while not stop.is_set():
                ask()

        good = threading.Thread(target=behave)
        good.start()
        try:
            for number in range(REQUESTS):
                try:
                    attack(server, number, generator)
                except (OSError, ConnectionClosed, TimeoutError):
                    continue
        finally:
            stop.set()
            good.join()
        ask()
        errors = requests.get(server.url + "/metrics", timeout=10).text
    assert len(waits) > 3 and max(waits) < TIME_LIMIT
    assert 'status="400"' in errors and 'status="500"' not in errors
    print(f"{REQUESTS} hostile requests; {len(waits)} answers to a good client, the slowest after {max(waits):.3f} s")
