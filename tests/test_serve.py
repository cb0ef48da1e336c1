"""serve.py as it is run: a process of its own, a real model, a robot that asks it, and a signal that ends it."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import json_numpy
import numpy as np
import pytest
import requests
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from prismatic.bench.serve import flood
from prismatic.checkpoint import load_policy
from prismatic.machine import resident
from prismatic.serving.guard import KEY_VARIABLE
from tests.conftest import REPOSITORY
from tests.fake_policy import FakePolicy, picture
from tests.live_server import body, fields, live, openpi

CHECKPOINT = REPOSITORY / "checkpoints" / "openvla-tiny"


def serve(*flags: str, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "serve.py", *flags]
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE} | more
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def robot() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A served checkpoint, and the curl line that it printed."""
    process = serve("--pretrained_checkpoint", str(CHECKPOINT), "--port", "0", "--max_batch", "4", OMP_NUM_THREADS="1")
    assert process.stdout is not None
    lines = []
    while not lines or not lines[-1].startswith("curl"):
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        lines.append(line)
    assert any(line.startswith("warmed up with batches of 1 in") for line in lines)
    yield process, lines[-1].strip()
    process.kill()
    process.communicate()


def begun(url: str, body: str) -> socket.socket:
    """A connection whose request is under way: the server has asked for its body."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST /act HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    connection.sendall(head.encode())
    assert connection.recv(1024).startswith(b"HTTP/1.1 100 ")
    return connection


def ended(connection: socket.socket, body: str) -> np.ndarray:
    """The answer to such a request."""
    with connection, connection.makefile("rb") as stream:
        connection.sendall(body.encode())
        head, _, answer = stream.read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        return json_numpy.loads(answer.decode())


def test_a_server_answers_as_the_policy_does_alone_and_in_batches_and_stops_when_it_has_answered(
    robot: tuple[subprocess.Popen[str], str],
) -> None:
    process, command = robot
    printed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True).stdout
    assert np.isfinite(json.loads(printed)).all() and len(json.loads(printed)) == 7
    url = command.split()[2].removesuffix("/example")
    policy = load_policy(CHECKPOINT)
    asked = [fields(seed, "pick up the bowl") | {"session": f"robot {seed}"} for seed in range(6)]
    expected = [policy(picture(seed), "pick up the bowl", picture(seed + 1000)) for seed in range(6)]

    def http(n: int) -> np.ndarray:
        return json_numpy.loads(requests.post(url + "/act", data=json_numpy.dumps(asked[n]), timeout=60).text)

    def socket_client(n: int) -> np.ndarray:
        client = WebsocketClientPolicy("127.0.0.1", int(url.rpartition(":")[2]))
        action = client.infer(openpi(n, "pick up the bowl"))["actions"][0].copy()
        action[6] = (1 - action[6]) / 2
        return action

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda n: (http, socket_client)[n % 2](n), range(6)))
        np.testing.assert_allclose(together, expected, atol=1e-6)
        np.testing.assert_allclose(http(1), expected[1], atol=1e-6)
        metadata = requests.get(url + "/metadata", timeout=10).json()
        assert metadata["checkpoint_fingerprint"] and metadata["gripper_dims"] == [6]
        metrics = requests.get(url + "/metrics", timeout=10).text
        assert float(next(r for r in metrics.splitlines() if r.startswith("serve_batch_rows_count")).split()[1]) < 8
    bodies = [json_numpy.dumps(one) for one in asked]
    under_way = [begun(url, text) for text in bodies]
    process.send_signal(signal.SIGTERM)
    answers = [ended(connection, text) for connection, text in zip(under_way, bodies, strict=True)]
    np.testing.assert_allclose(answers, expected, atol=1e-6)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    rows = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert len(rows) == 14 and {row["status"] for row in rows} == {200} and {"infer_ms", "queue_ms"} <= rows[-1].keys()
    assert "stopped by SIGTERM" in errors and "Traceback" not in errors


def test_a_wrong_configuration_is_one_sentence_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k" * 20)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wrong = [
            (("--host", "0.0.0.0"), "--api_key_file"),
            (("--port", str(taken.getsockname()[1])), "--port"),
            (("--host", "no.such.host.invalid", "--api_key_file", str(tmp_path / "key")), "--host"),
            (("--max_wait_ms", "-1"), "--max_wait_ms"),
        ]
        started = [serve("--pretrained_checkpoint", str(CHECKPOINT), *flags) for flags, _ in wrong]
        for process, (_, name) in zip(started, wrong, strict=True):
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 2 and errors.startswith("error: ") and errors.count("\n") == 1, errors
            assert name in errors


def test_not_healthy_before_warm_up_and_while_stopping() -> None:
    policy = FakePolicy()
    with live(policy, warm=False) as server:
        assert server.get("/healthz").status_code == 503
        refused = server.act(body())
        assert refused.status_code == 503 and "warming up" in refused.json()["error"]
        server.service.ready = True
        healthy = server.get("/healthz")
        assert (healthy.status_code, healthy.text) == (200, "OK")
        assert server.get("/health").json() == {"status": "ok"}
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        policy.gate.clear()
        with ThreadPoolExecutor(2) as pool, requests.Session() as session:
            session.get(server.url + "/healthz", timeout=10)  # keeps its connection
            under_way = pool.submit(client.infer, openpi())
            while not server.service.under_way:
                time.sleep(0.01)
            server.server.should_exit = True  # as a signal does
            while not server.service.draining:
                time.sleep(0.01)
            assert session.get(server.url + "/healthz", timeout=10).status_code == 503
            policy.gate.set()
            assert under_way.result(10)["actions"].shape == (1, 7)  # finished, then closed


def test_the_access_log_is_a_json_line_a_request_without_what_was_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="serve.access"), live(FakePolicy()) as server:
        server.act(body(words="a secret"))
        server.act('{"instruction": "a secret"}')
    good, bad = (json.loads(record.message) for record in caplog.records if record.name == "serve.access")
    assert (good["dialect"], good["status"], good["rows"]) == ("openvla", 200, 1) and good["ms"] >= good["infer_ms"] > 0
    assert bad["status"] == 400 and "image is missing" in bad["error"]
    assert "secret" not in caplog.text


def test_memory_is_flat() -> None:
    """Bytes per request over some hundreds: bench.py serve asks the same of 10,000."""
    with live(FakePolicy()) as server:
        flood(server.port, 200)
        before = resident()
        flood(server.port, 200)
        assert (resident() - before) / 200 < 20_000
