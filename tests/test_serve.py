"""serve.py as it is run: a process of its own, a real model, a robot that asks it, and a signal that ends it."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import json_numpy
import numpy as np
import pytest
import requests
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from prismatic.checkpoint import load_policy
from prismatic.serving.guard import KEY_VARIABLE
from tests.conftest import REPOSITORY
from tests.fake_policy import FakePolicy, picture
from tests.live_server import live

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


def test_the_printed_command_works(robot: tuple[subprocess.Popen[str], str]) -> None:
    answer = subprocess.run(["bash", "-c", robot[1]], capture_output=True, text=True, timeout=60, check=True).stdout
    assert np.isfinite(json.loads(answer)).all() and len(json.loads(answer)) == 7


def test_a_server_answers_as_the_policy_does_alone_and_in_batches_and_stops_when_it_has_answered(
    robot: tuple[subprocess.Popen[str], str],
) -> None:
    process, command = robot
    url = command.split()[2].removesuffix("/example")
    policy = load_policy(CHECKPOINT)
    frames, wrists = ([picture(seed + n, 128) for n in range(6)] for seed in (0, 50))
    expected = [policy(*row) for row in zip(frames, ["pick up the bowl"] * 6, wrists, strict=True)]

    def http(n: int) -> np.ndarray:
        body = {
            "image": frames[n],
            "wrist_image": wrists[n],
            "instruction": "pick up the bowl",
            "session": f"robot {n}",
        }
        return json_numpy.loads(requests.post(url + "/act", data=json_numpy.dumps(body), timeout=60).text)

    def openpi(n: int) -> np.ndarray:
        client = WebsocketClientPolicy("127.0.0.1", int(url.rpartition(":")[2]))
        asked = {"observation/image": frames[n], "observation/wrist_image": wrists[n], "prompt": "pick up the bowl"}
        action = client.infer(asked)["actions"][0].copy()
        action[6] = (1 - action[6]) / 2
        return action

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda n: (http, openpi)[n % 2](n), range(6)))
        np.testing.assert_allclose(together, expected, atol=1e-6)
        np.testing.assert_allclose(http(1), expected[1], atol=1e-6)
        assert requests.get(url + "/metadata", timeout=10).json()["checkpoint_fingerprint"]
        rows = requests.get(url + "/metrics", timeout=10).text
        assert float(next(r for r in rows.splitlines() if r.startswith("serve_batch_rows_count")).split()[1]) < 8
        under_way = [pool.submit(http, n) for n in range(6)]
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        np.testing.assert_allclose([one.result() for one in under_way], expected, atol=1e-6)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    rows = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert len(rows) == 14 and {row["status"] for row in rows} == {200} and {"infer_ms", "queue_ms"} <= rows[-1].keys()
    assert "Traceback" not in errors


def test_a_wrong_configuration_is_one_sentence_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wrong = [
            (("--host", "0.0.0.0"), "--api_key_file"),
            (("--port", str(taken.getsockname()[1])), "--port"),
            (("--host", "no.such.host.invalid", "--api_key_file", str(tmp_path / "key")), "--host"),
            (("--max_batch", "0"), "--max_batch"),
            (("--max_wait_ms", "-1"), "--max_wait_ms"),
        ]
        (tmp_path / "key").write_text("k" * 20)
        started = [serve("--pretrained_checkpoint", str(CHECKPOINT), *flags) for flags, _ in wrong]
        for process, (_, name) in zip(started, wrong, strict=True):
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 2 and errors.startswith("error: ") and errors.count("\n") == 1, errors
            assert name in errors


def test_not_healthy_before_warm_up_and_while_stopping() -> None:
    policy = FakePolicy()
    body = json_numpy.dumps({"image": picture(1), "wrist_image": picture(2), "instruction": "go"})
    with live(policy, warm=False) as server:
        assert requests.get(server.url + "/healthz", timeout=10).status_code == 503
        refused = requests.post(server.url + "/act", data=body, timeout=10)
        assert refused.status_code == 503 and "warming up" in refused.json()["error"]
        server.service.ready = True
        healthy = requests.get(server.url + "/healthz", timeout=10)
        assert (healthy.status_code, healthy.text) == (200, "OK")
        assert requests.get(server.url + "/health", timeout=10).json() == {"status": "ok"}
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        observation = {"observation/image": picture(1), "observation/wrist_image": picture(2), "prompt": "go"}
        policy.gate.clear()
        with ThreadPoolExecutor(2) as pool, requests.Session() as session:
            session.get(server.url + "/healthz", timeout=10)  # keeps its connection
            under_way = pool.submit(client.infer, observation)
            while not server.service.under_way:
                time.sleep(0.01)
            server.stop()
            while not server.service.draining:
                time.sleep(0.01)
            assert session.get(server.url + "/healthz", timeout=10).status_code == 503
            policy.gate.set()
            assert under_way.result(10)["actions"].shape == (1, 7)  # finished, then closed


def test_the_access_log_is_a_json_line_a_request_without_what_was_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="serve.access"), live(FakePolicy()) as server:
        body = {"image": picture(1), "wrist_image": picture(2), "instruction": "a secret"}
        requests.post(server.url + "/act", data=json_numpy.dumps(body), timeout=10)
        requests.post(server.url + "/act", data='{"instruction": "a secret"}', timeout=10)
    good, bad = (json.loads(record.message) for record in caplog.records if record.name == "serve.access")
    assert (good["dialect"], good["status"], good["rows"]) == ("openvla", 200, 1) and good["ms"] >= good["infer_ms"] > 0
    assert bad["status"] == 400 and "image is missing" in bad["error"]
    assert "secret" not in caplog.text


def test_no_answer_waits_for_the_clients_delayed_acknowledgement() -> None:
    """With Nagle's algorithm each answer on a kept connection took 40 ms more."""
    body = json_numpy.dumps({"image": picture(1), "wrist_image": picture(2), "instruction": "go"})
    times = []
    with live(FakePolicy()) as server, requests.Session() as session:
        for _ in range(20):
            start = time.monotonic()
            assert session.post(server.url + "/act", data=body, timeout=10).status_code == 200
            times.append(time.monotonic() - start)
    assert min(times[1:]) < 0.03


def test_memory_is_flat() -> None:
    """Bytes per request over some hundreds: bench.py serve asks the same of 10,000."""
    from prismatic.machine import resident

    body = json_numpy.dumps({"image": picture(1), "wrist_image": picture(2), "instruction": "go"})
    with live(FakePolicy()) as server:

        def ask(times: int) -> None:
            with requests.Session() as session:
                for number in range(times):
                    session.post(server.url + "/act", data=body, timeout=10)
                    if number % 10 == 0:
                        requests.post(server.url + "/act", data=b"{" * 50, timeout=10)

        threads = [threading.Thread(target=ask, args=(100,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        before = resident()
        ask(200)
        assert (resident() - before) / 200 < 20_000
