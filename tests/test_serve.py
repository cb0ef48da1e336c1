"""serve.py as it is run: a process of its own, a real model, a robot that asks it, and a signal that ends it."""

import asyncio
import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import json_numpy
import numpy as np
import pytest
import requests
from openpi_client.websocket_client_policy import WebsocketClientPolicy

import serve
from prismatic.bench.serve import flood
from prismatic.checkpoint import load_policy
from prismatic.errors import ConfigError, PolicyError
from prismatic.machine import resident
from prismatic.serving.app import Server
from prismatic.serving.guard import KEY_VARIABLE
from prismatic.serving.observation import Limits
from prismatic.serving.service import Service
from serve import ServeConfig
from tests.conftest import REPOSITORY
from tests.fake_policy import FakePolicy, picture
from tests.live_server import body, fields, live, openpi

CHECKPOINT = REPOSITORY / "checkpoints" / "openvla-tiny"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    flags = f"--pretrained_checkpoint {CHECKPOINT} --port 0 --max_batch 4"
    environment = os.environ | {"OMP_NUM_THREADS": "1", KEY_VARIABLE: ""}
    how: dict[str, Any] = {"cwd": REPOSITORY, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "serve.py", *flags.split()], text=True, **how) as started:
        yield started
        started.kill()


def test_a_server_answers_as_the_policy_does_alone_and_in_batches_and_leaves_with_143(
    process: subprocess.Popen[str],
) -> None:
    assert process.stdout is not None
    said = [*itertools.takewhile(lambda line: not line.startswith("try it"), process.stdout)]
    if not any(re.match(r"warmed up with batches of 4 in .* s, 2 in .* s, 1 in", line) for line in said):
        process.kill()  # else nobody ends it, and what it wrote is not all there
        pytest.fail(f"not warmed up: {said} {process.communicate()[1]}")
    command = process.stdout.readline()
    printed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True).stdout
    assert np.isfinite(json.loads(printed)).all() and len(json.loads(printed)) == 7
    url = command.split()[2].removesuffix("/example")
    policy = load_policy(CHECKPOINT)
    expected = [policy(picture(seed), "pick up the bowl", picture(seed + 1000)) for seed in range(6)]

    def ask(seed: int) -> np.ndarray:
        asked = fields(seed, "pick up the bowl") | {"session": f"robot {seed}"}
        return json_numpy.loads(requests.post(url + "/act", data=json_numpy.dumps(asked), timeout=60).text)

    with ThreadPoolExecutor(6) as pool:
        np.testing.assert_allclose([*pool.map(ask, range(6)), ask(1)], [*expected, expected[1]], atol=1e-6)
    metadata = requests.get(url + "/metadata", timeout=10).json()
    assert metadata["checkpoint_fingerprint"] and metadata["gripper_dims"] == [6]
    metrics = requests.get(url + "/metrics", timeout=10).text
    assert float(next(r for r in metrics.splitlines() if r.startswith("serve_batch_rows_count")).split()[1]) < 8
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    rows = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert len(rows) == 8 and {row["status"] for row in rows} == {200} and {"infer_ms", "queue_ms"} <= rows[-1].keys()
    assert "stopped by SIGTERM" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("change", "key", "flag"),
    [
        ({"host": "0.0.0.0"}, "", "--api_key_file"),
        ({"host": "no.such.host.invalid"}, "k" * 20, "--host"),
        ({"max_wait_ms": -1}, "", "--max_wait_ms"),
        ({}, "", "--port"),
    ],
)
def test_a_wrong_configuration_is_one_sentence_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], key: str, flag: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=flag):
        serve.main(ServeConfig("no checkpoint", port=taken.getsockname()[1], **change))


def test_the_printed_command_has_the_key_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, host, wanted in (
        ("k" * 20, "::1", f"${KEY_VARIABLE}"),
        ("k" * 20, "[::1]", "http://[::1]:80/act"),
        ("", "::1", "curl -s http"),
    ):
        monkeypatch.setenv(KEY_VARIABLE, key)
        assert wanted in serve.addresses(ServeConfig("", host=host), 80)[-1]


def test_a_port_that_another_took_meanwhile_is_one_sentence() -> None:
    both = [serve.bind("127.0.0.1", 0)]
    both.append(serve.bind("127.0.0.1", both[0].getsockname()[1]))  # neither listens yet
    both[0].listen()
    server = Server(Service(FakePolicy(), Limits(), max_batch=1, max_wait=0.0, prepare=lambda frame: frame), None)
    with both[0], both[1], pytest.raises(ConfigError, match="give another --port"):
        asyncio.run(server.run_until_stopped(both[1], lambda times: None))


def test_not_healthy_before_warm_up_and_while_stopping() -> None:
    policy = FakePolicy()
    policy.gate.clear()
    with live(policy, warm=False) as server, ThreadPoolExecutor(2) as pool, requests.Session() as session:
        assert server.get("/healthz").status_code == 503
        refused = server.act(body())
        assert refused.status_code == 503 and "warming up" in refused.json()["error"]
        policy.gate.set()
        while not server.service.ready:
            time.sleep(0.01)
        assert session.get(server.url + "/healthz", timeout=10).text == "OK"  # keeps its connection
        assert server.get("/health").json() == {"status": "ok"}
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        policy.gate.clear()
        chunk, answer = pool.submit(client.infer, openpi()), pool.submit(server.act, body())
        while server.service.under_way < 2:
            time.sleep(0.01)
        server.server.should_exit = True  # as a signal does
        while not server.service.draining:
            time.sleep(0.01)
        assert session.get(server.url + "/healthz", timeout=10).status_code == 503
        policy.gate.set()
        assert chunk.result(10)["actions"].shape == (1, 7)  # finished, then closed
        assert answer.result(10).status_code == 200


def test_the_largest_batch_is_warmed_up_first_and_what_was_learnt_of_the_decoder_is_told() -> None:
    class Compiled(FakePolicy):
        def metadata(self) -> dict[str, Any]:
            return super().metadata() | {"decoder": f"{len(self.batches)} batches"}

    policy = Compiled()
    service = Service(policy, Limits(), max_batch=6, max_wait=0.0, warm_ups=2)
    times = asyncio.run(service.warm_up())
    # of each size one of long instructions, one of short ones, and the one that is timed
    assert [rows for rows, _ in times] == [6, 4, 2, 1] and policy.batches == [
        rows for rows in (6, 4, 2, 1) for _ in range(3)
    ]
    assert service.describe()["decoder"] == "12 batches"


def test_a_batch_for_which_there_is_no_memory_is_made_smaller(caplog: pytest.LogCaptureFixture) -> None:
    class Small(FakePolicy):
        most = 2

        def batch_chunks(self, frames: Any, *given: Any, **named: Any) -> np.ndarray:
            if len(frames) > self.most:
                raise PolicyError(f"the GPU has no memory to answer {len(frames)} at once")
            return super().batch_chunks(frames, *given, **named)

    policy = Small()
    service = Service(policy, Limits(), max_batch=6, max_wait=0.0)
    assert [rows for rows, _ in asyncio.run(service.warm_up())] == [2, 1]
    assert service.describe()["max_batch"] == 2 and "answer 6 at once: --max_batch is 4" in caplog.text
    policy.most = 0
    with pytest.raises(ConfigError, match="answer 1 at once"):
        asyncio.run(service.warm_up())


def test_the_access_log_is_a_json_line_a_request_without_what_was_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="serve.access"), live(FakePolicy()) as server:
        server.act(body(words="a secret"))
        server.act('{"instruction": "a secret"}')
    good, bad = (json.loads(record.message) for record in caplog.records if record.name == "serve.access")
    assert (good["dialect"], good["status"], good["rows"]) == ("openvla", 200, 1) and good["ms"] >= good["infer_ms"] > 0
    assert bad["status"] == 400 and "image is missing" in bad["error"]
    assert "secret" not in caplog.text


def test_memory_is_flat() -> None:
    """Bytes per request over some dozens: bench.py serve asks the same of 10,000."""
    with live(FakePolicy()) as server:
        flood(server.port, 60)
        before = resident()
        flood(server.port, 60)
        assert (resident() - before) / 60 < 50_000
