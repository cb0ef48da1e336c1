"""The queue: batches equal single calls, nobody waits for a slow or dead client, and a full queue says so."""

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import json_numpy
import numpy as np
import requests
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from prismatic.image import decode_jpeg, encode_jpeg
from prismatic.serving.batching import BatchQueue
from prismatic.serving.observation import Limits, Observation, RequestError
from tests.fake_policy import FakePolicy, picture
from tests.live_server import Live, body, live, openpi


def observation(seed: int, words: str = "go") -> Observation:
    return Observation(picture(seed), words, wrist=picture(seed + 1000))


def with_queue(policy: FakePolicy, work: Callable[[BatchQueue], Awaitable[Any]], *, max_wait: float) -> Any:
    """What work(queue) returns."""

    async def main() -> Any:
        queue = BatchQueue(policy, max_batch=16, max_wait=max_wait, max_waiting=100, on_batch=lambda rows: None)
        worker = asyncio.create_task(queue.run())
        found = await work(queue)
        worker.cancel()
        return found

    return asyncio.run(main())


def answers(policy: FakePolicy, observations: list[Observation]) -> list:
    """What the queue gives to requests that arrive together; the errors as they are."""
    return with_queue(
        policy,
        lambda queue: asyncio.gather(*map(queue.ask, observations), return_exceptions=True),
        max_wait=0.05,
    )


def test_what_arrives_together_is_one_batch_and_equals_single_calls() -> None:
    policy = FakePolicy(num_actions_chunk=3)
    observations = [observation(n, f"task {n % 5}") for n in range(20)]
    found = answers(policy, observations)
    assert policy.batches == [16, 4]
    for one, asked in zip(found, observations, strict=True):
        np.testing.assert_array_equal(one.chunk, policy.answer(asked.frame, asked.instruction, asked.wrist))


def test_both_images_are_prepared_side_by_side_and_recorded_as_they_came(tmp_path: Path) -> None:
    both, policy = threading.Barrier(2, timeout=20), FakePolicy()
    refused = [picture(7)[0, 0, 0], picture(1007)[0, 0, 0]]

    def inverted(frame: np.ndarray) -> np.ndarray:
        if frame[0, 0, 0] in refused:
            raise ValueError("no image")
        both.wait()  # broken unless another image is here meanwhile
        return 255 - frame

    with live(policy, prepare=inverted, record=tmp_path) as server:
        answer = json_numpy.loads(server.act(body(1)).text)
        np.testing.assert_array_equal(answer, policy.answer(255 - picture(1), "go", 255 - picture(1001))[0])
        assert server.act(body(7)).status_code == 500
        assert server.act(body(2)).status_code == 200
    rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    recorded = [[decode_jpeg((tmp_path / row[name]).read_bytes()) for name in ("frame", "wrist")] for row in rows]
    expected = [[decode_jpeg(encode_jpeg(picture(seed + more))) for more in (0, 1000)] for seed in (1, 2)]
    np.testing.assert_array_equal(recorded, expected)


def test_only_the_request_at_fault_is_refused() -> None:
    found = answers(FakePolicy(), [observation(1), observation(2, "explode"), observation(3), observation(4, "nan")])
    assert [isinstance(one, RequestError) for one in found] == [False, True, False, True]
    assert found[1].status == 500 and "ValueError" in str(found[1]) and "NaN" in str(found[3])


def test_a_batch_waits_for_those_who_were_there_a_moment_ago_and_a_client_alone_for_nobody() -> None:
    async def work(queue: BatchQueue) -> tuple[float, float]:
        await asyncio.gather(*(queue.ask(observation(n)) for n in range(4)))

        async def late(n: int) -> None:
            await asyncio.sleep(0.02 * n)
            await queue.ask(observation(n))

        await asyncio.gather(*map(late, range(4)))
        times = [time.monotonic()]
        for n in range(3):
            await queue.ask(observation(n))
            times.append(time.monotonic())
        return times[1] - times[0], times[3] - times[1]

    policy = FakePolicy()
    first, later = with_queue(policy, work, max_wait=2.0)
    assert policy.batches == [4, 4, 1, 1, 1]
    assert first > 1.5 and later < 1  # the others' going is noticed once


def test_a_full_queue_answers_503_with_retry_after() -> None:
    policy = FakePolicy()
    with live(policy, limits=Limits(queue=2), max_batch=1) as server, ThreadPoolExecutor(8) as pool:
        policy.gate.clear()
        asked = [pool.submit(server.act, body(n)) for n in range(8)]
        end = time.monotonic() + 10
        while sum(one.done() for one in asked) < 5 and time.monotonic() < end:
            time.sleep(0.01)
        policy.gate.set()
        responses = sorted((one.result() for one in asked), key=lambda response: response.status_code)
    assert [response.status_code for response in responses] == [200] * 3 + [503] * 5
    assert responses[-1].headers["Retry-After"] == "1" and "try again" in responses[-1].json()["error"]


def test_many_clients_of_several_dialects_each_get_their_own_answers_in_order() -> None:
    policy = FakePolicy(delay=0.005)

    def http(server: Live, seeds: range) -> None:
        for seed in seeds:
            expected = policy.answer(picture(seed), "go", picture(seed + 1000))[0]
            np.testing.assert_array_equal(json_numpy.loads(server.act(body(seed)).text), expected)

    def socket_client(server: Live, seeds: range) -> None:
        connection = WebsocketClientPolicy("127.0.0.1", server.port)
        for seed in seeds:
            expected = policy.answer(picture(seed), "go", picture(seed + 1000))
            np.testing.assert_array_equal(connection.infer(openpi(seed))["actions"][:, :6], expected[:, :6])

    with live(policy) as server, ThreadPoolExecutor(12) as pool:
        policy.batches.clear()
        clients = [(http, socket_client)[n % 2] for n in range(12)]
        for done in [pool.submit(work, server, range(100 * n, 100 * n + 10)) for n, work in enumerate(clients)]:
            done.result()
        metrics = server.get("/metrics").text
    assert sum(policy.batches) == 120 and np.mean(policy.batches) > 2
    for dialect in ("openvla", "openpi"):
        assert f'serve_requests_total{{dialect="{dialect}",status="200"}} 60.0' in metrics


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
        assert [server.act(body(n)).status_code for n in range(5)] == [200] * 5
        assert time.monotonic() - start < 5
        slow.close()


def test_no_answer_waits_for_the_clients_delayed_acknowledgement() -> None:
    """With Nagle's algorithm each answer on a kept connection took 40 ms more."""
    times = [time.monotonic()]
    with live(FakePolicy()) as server, requests.Session() as session:
        for _ in range(20):
            assert session.post(server.url + "/act", data=body(), timeout=10).status_code == 200
            times.append(time.monotonic())
    assert min(np.diff(times)[1:]) < 0.03


def test_record_keeps_what_was_asked_and_answered(tmp_path: Path) -> None:
    policy = FakePolicy()
    with live(policy, record=tmp_path / "seen") as server, ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda n: server.act(body(n)), range(3)))
    rows = [json.loads(line) for line in (tmp_path / "seen" / "requests.jsonl").read_text().splitlines()]
    expected = [policy.answer(picture(n), "go", picture(n + 1000)).tolist() for n in range(3)]
    assert sorted(row["actions"] for row in rows) == sorted(expected)
    assert {(row["instruction"], row["dialect"]) for row in rows} == {("go", "openvla")}
    files = {row[name] for row in rows for name in ("frame", "wrist")}
    assert len(files) == 6 and all((tmp_path / "seen" / f).read_bytes().startswith(b"\xff\xd8") for f in files)
