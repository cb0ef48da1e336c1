"""The queue: batches equal single calls, nobody waits for a slow or dead client, and a full queue says so."""

import asyncio
import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import json_numpy
import numpy as np
import requests
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from prismatic.serving.batching import BatchQueue
from prismatic.serving.observation import Limits, Observation, RequestError
from tests.fake_policy import FakePolicy, picture
from tests.live_server import Live, live


def observation(seed: int, words: str = "go") -> Observation:
    return Observation(picture(seed), words, wrist=picture(seed + 1000))


def answers(policy: FakePolicy, observations: list[Observation], **options: float) -> list:
    """What the queue gives to requests that arrive together; the errors as they are."""

    async def main() -> list:
        given = {"max_batch": 16, "max_wait": 0.05, "max_waiting": 100} | options
        queue = BatchQueue(policy, on_batch=lambda rows: None, **given)  # type: ignore[arg-type]
        worker = asyncio.create_task(queue.run())
        found = await asyncio.gather(*(queue.ask(o, n) for n, o in enumerate(observations)), return_exceptions=True)
        worker.cancel()
        return found

    return asyncio.run(main())


def test_what_arrives_together_is_one_batch_and_equals_single_calls() -> None:
    policy = FakePolicy(num_actions_chunk=3)
    observations = [observation(n, f"task {n % 5}") for n in range(20)]
    found = answers(policy, observations)
    assert policy.batches == [16, 4]
    for one, asked in zip(found, observations, strict=True):
        np.testing.assert_array_equal(one.chunk, policy.answer(asked.frame, asked.instruction, asked.wrist))


def test_only_the_request_at_fault_is_refused() -> None:
    policy = FakePolicy()
    found = answers(policy, [observation(1), observation(2, "explode"), observation(3), observation(4, "nan")])
    assert [isinstance(one, RequestError) for one in found] == [False, True, False, True]
    assert found[1].status == 500 and "ValueError" in str(found[1])
    assert "NaN" in str(found[3])


def test_a_client_alone_waits_for_nobody() -> None:
    async def main() -> float:
        queue = BatchQueue(FakePolicy(), max_batch=16, max_wait=5.0, max_waiting=100, on_batch=lambda rows: None)
        worker = asyncio.create_task(queue.run())
        start = time.monotonic()
        for n in range(5):
            await queue.ask(observation(n), n)
        worker.cancel()
        return time.monotonic() - start

    assert asyncio.run(main()) < 2


def test_a_batch_waits_for_those_who_were_there_a_moment_ago() -> None:
    async def main(policy: FakePolicy) -> None:
        queue = BatchQueue(policy, max_batch=16, max_wait=5.0, max_waiting=100, on_batch=lambda rows: None)
        worker = asyncio.create_task(queue.run())
        await asyncio.gather(*(queue.ask(observation(n), n) for n in range(4)))

        async def late(n: int) -> None:
            await asyncio.sleep(0.02 * n)
            await queue.ask(observation(n), n)

        await asyncio.gather(*(late(n) for n in range(4)))
        worker.cancel()

    policy = FakePolicy()
    asyncio.run(main(policy))
    assert policy.batches == [4, 4]


def body(seed: int, words: str = "go") -> str:
    return json_numpy.dumps({"image": picture(seed), "wrist_image": picture(seed + 1000), "instruction": words})


def test_a_full_queue_answers_503_with_retry_after() -> None:
    policy = FakePolicy()
    with live(policy, limits=Limits(queue=2), max_batch=1) as server, ThreadPoolExecutor(8) as pool:
        policy.gate.clear()
        try:
            asked = [pool.submit(requests.post, server.url + "/act", data=body(n), timeout=10) for n in range(8)]
            end = time.monotonic() + 10
            while sum(one.done() for one in asked) < 5 and time.monotonic() < end:
                time.sleep(0.01)
        finally:
            policy.gate.set()
        responses = [one.result() for one in asked]
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [200] * 3 + [503] * 5
    refused = next(response for response in responses if response.status_code == 503)
    assert refused.headers["Retry-After"] == "1" and "try again" in refused.json()["error"]


def test_many_clients_of_several_dialects_each_get_their_own_answers_in_order() -> None:
    policy = FakePolicy(delay=0.005)

    def http(server: Live, client: int) -> None:
        with requests.Session() as session:
            for n in range(10):
                seed = 100 * client + n
                response = session.post(server.url + "/act", data=body(seed), timeout=10)
                expected = policy.answer(picture(seed), "go", picture(seed + 1000))[0]
                np.testing.assert_array_equal(json_numpy.loads(response.text), expected)

    def openpi(server: Live, client: int) -> None:
        connection = WebsocketClientPolicy("127.0.0.1", server.port)
        for n in range(10):
            seed = 100 * client + n
            asked = {
                "observation/image": picture(seed),
                "observation/wrist_image": picture(seed + 1000),
                "prompt": "go",
            }
            expected = policy.answer(picture(seed), "go", picture(seed + 1000))
            np.testing.assert_array_equal(connection.infer(asked)["actions"][:, :6], expected[:, :6])

    with live(policy) as server, ThreadPoolExecutor(12) as pool:
        policy.batches.clear()
        for done in [pool.submit((http, openpi)[n % 2], server, n) for n in range(12)]:
            done.result()
        metrics = requests.get(server.url + "/metrics", timeout=10).text
    assert sum(policy.batches) == 120 and np.mean(policy.batches) > 2
    assert 'serve_requests_total{dialect="openvla",status="200"} 60.0' in metrics
    assert 'serve_requests_total{dialect="openpi",status="200"} 60.0' in metrics


def test_a_slow_or_dead_client_delays_nobody() -> None:
    with live(FakePolicy()) as server:
        slow = socket.create_connection(("127.0.0.1", server.port))
        slow.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        for n in range(20):  # ask, and go without waiting for the answer
            dead = socket.create_connection(("127.0.0.1", server.port))
            data = body(n).encode()
            dead.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            dead.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            dead.close()
        start = time.monotonic()
        for n in range(5):
            assert requests.post(server.url + "/act", data=body(n), timeout=10).status_code == 200
        assert time.monotonic() - start < 5
        slow.close()


def test_record_keeps_what_was_asked_and_answered(tmp_path: Path) -> None:
    policy = FakePolicy()
    with live(policy, record=tmp_path / "seen") as server:
        threads = [
            threading.Thread(target=requests.post, args=(server.url + "/act",), kwargs={"data": body(n), "timeout": 10})
            for n in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rows = [json.loads(line) for line in (tmp_path / "seen" / "requests.jsonl").read_text().splitlines()]
    expected = [policy.answer(picture(n), "go", picture(n + 1000)).tolist() for n in range(3)]
    assert sorted(row["actions"] for row in rows) == sorted(expected)
    for row in rows:
        assert row["instruction"] == "go" and row["dialect"] == "openvla"
        for name in ("frame", "wrist"):
            assert (tmp_path / "seen" / row[name]).read_bytes().startswith(b"\xff\xd8")
    assert len({row["frame"] for row in rows} | {row["wrist"] for row in rows}) == 6
