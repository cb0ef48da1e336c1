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
import pytest
import requests
import torch
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from prismatic.checkpoint import load_policy
from prismatic.errors import ConfigError
from prismatic.image import decode_jpeg, encode_jpeg
from prismatic.observation import Observation
from prismatic.policy import Policy
from prismatic.serving.batching import BatchQueue
from prismatic.serving.observation import Limits, RequestError
from prismatic.serving.recording import Recorder
from tests.conftest import REPOSITORY
from tests.fake_policy import FakePolicy, picture
from tests.live_server import Live, body, live, openpi


def observation(seed: int, words: str = "go") -> Observation:
    return Observation(picture(seed), words, wrist=picture(seed + 1000))


def with_queue(policy: Policy, work: Callable[[BatchQueue], Awaitable[Any]], *, max_wait: float = 0.05) -> Any:
    """What work(queue) returns."""

    async def main() -> Any:
        queue = BatchQueue(policy, max_batch=16, max_wait=max_wait, max_waiting=100)
        worker = asyncio.create_task(queue.run())
        found = await work(queue)
        worker.cancel()
        return found

    return asyncio.run(main())


def test_what_arrives_together_is_one_batch_that_equals_single_calls_and_only_the_request_at_fault_is_refused() -> None:
    policy = FakePolicy(num_actions_chunk=3)
    asked = [observation(n, f"task {n % 5}") for n in range(20)]
    bad = [observation(20, "explode"), observation(21), observation(22, "nan")]
    together, mixed = with_queue(
        policy,
        lambda queue: asyncio.gather(
            asyncio.gather(*map(queue.ask, asked)), asyncio.gather(*map(queue.ask, bad), return_exceptions=True)
        ),
    )
    assert policy.batches[:2] == [16, 7]
    for answer, one in zip([*together, mixed[1]], [*asked, bad[1]], strict=True):
        np.testing.assert_array_equal(answer.chunk, policy.answer(one.frame, one.instruction, one.wrist))
    assert all(isinstance(error, RequestError) and error.status == 500 for error in mixed[::2])
    assert "ValueError" in str(mixed[0]) and "NaN" in str(mixed[2])


def test_an_instruction_that_the_model_cannot_read_is_the_clients_to_mend() -> None:
    policy = load_policy(REPOSITORY / "checkpoints/openvla-tiny", device="cpu")
    asked = [observation(1), observation(2, "\N{GRINNING FACE}" * 1000)]  # four tokens each
    answer, error = with_queue(policy, lambda queue: asyncio.gather(*map(queue.ask, asked), return_exceptions=True))
    assert answer.chunk.shape == (1, 7)
    assert isinstance(error, RequestError) and error.status == 400 and "shorten it" in str(error)


def test_what_the_machine_lacks_is_not_the_clients_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(REPOSITORY / "checkpoints/openvla-tiny", device="cpu")

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(policy, "raw_chunks", full)
    (error,) = with_queue(policy, lambda queue: asyncio.gather(queue.ask(observation(1)), return_exceptions=True))
    assert isinstance(error, RequestError) and error.status == 500 and "no memory left" in str(error)


def test_after_a_fault_of_the_gpu_nobody_is_kept_waiting_and_the_server_ends() -> None:
    policy = FakePolicy()

    def broken(*_: Any, **__: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    async def work() -> list[Any]:
        queue = BatchQueue(policy, max_batch=2, max_wait=0.0, max_waiting=100)
        asked = [asyncio.create_task(queue.ask(observation(n))) for n in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(torch.AcceleratorError):
            await queue.run()
        return await asyncio.gather(*asked, return_exceptions=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "batch_chunks", broken)
        answers = asyncio.run(work())
    assert [(type(error), error.status) for error in answers] == [(RequestError, 503)] * 5


def test_both_images_are_prepared_side_by_side_and_recorded_as_they_came(tmp_path: Path) -> None:
    both, policy = threading.Barrier(2, timeout=20), FakePolicy()
    refused = [picture(7)[0, 0, 0], picture(1007)[0, 0, 0]]

    def inverted(frame: np.ndarray) -> np.ndarray:
        if frame[0, 0, 0] in refused:
            raise ValueError("no image")
        both.wait()  # broken unless another image is here meanwhile
        return 255 - frame

    with live(policy, prepare=inverted, record=tmp_path / "seen") as server:
        assert [server.act(body(seed)).status_code for seed in (1, 7, 2)] == [200, 500, 200]
    rows = [json.loads(line) for line in (tmp_path / "seen/requests.jsonl").read_text().splitlines()]
    for seed, row in zip((1, 2), rows, strict=True):
        assert (row["instruction"], row["dialect"], row["state"]) == ("go", "openvla", None)
        frame, wrist = picture(seed), picture(seed + 1000)
        np.testing.assert_array_equal(row["actions"], policy.answer(255 - frame, "go", 255 - wrist))
        for name, sent in (("frame", frame), ("wrist", wrist)):
            found = decode_jpeg((tmp_path / "seen" / row[name]).read_bytes())
            np.testing.assert_array_equal(found, decode_jpeg(encode_jpeg(sent)))


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


def test_nothing_is_computed_for_who_hung_up() -> None:
    policy = FakePolicy()
    with live(policy, max_batch=1) as server, ThreadPoolExecutor(1) as pool:
        policy.batches.clear()
        policy.gate.clear()
        first = pool.submit(server.act, body())
        while not server.service.under_way:
            time.sleep(0.01)
        for n in range(5):
            with pytest.raises(requests.Timeout):
                requests.post(server.url + "/act", data=body(n), timeout=0.2)
        end = time.monotonic() + 10
        while server.service.under_way > 1 and time.monotonic() < end:
            time.sleep(0.01)
        assert server.service.under_way == 1
        policy.gate.set()
        assert first.result().status_code == server.act(body(9)).status_code == 200
        assert policy.batches == [1, 1]
        assert 'status="499"} 5.0' in server.get("/metrics").text


def test_many_clients_of_several_dialects_each_get_their_own_answers_in_order() -> None:
    policy = FakePolicy(delay=0.005)

    def client(server: Live, number: int) -> None:
        ws = WebsocketClientPolicy("127.0.0.1", server.port) if number % 2 else None
        for seed in range(100 * number, 100 * number + 10):
            expected = policy.answer(picture(seed), "go", picture(seed + 1000))[0]
            found = ws.infer(openpi(seed))["actions"][0] if ws else json_numpy.loads(server.act(body(seed)).text)
            np.testing.assert_array_equal(found[:6], expected[:6])

    with live(policy) as server, ThreadPoolExecutor(12) as pool:
        policy.batches.clear()
        list(pool.map(lambda number: client(server, number), range(12)))
        metrics = server.get("/metrics").text
    assert sum(policy.batches) == 120 and np.mean(policy.batches) > 2
    for dialect in ("openvla", "openpi"):
        assert f'serve_requests_total{{dialect="{dialect}",status="200"}} 60.0' in metrics


def test_a_slow_or_dead_client_delays_nobody() -> None:
    head = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    with live(FakePolicy()) as server, requests.Session() as session:
        slow = socket.create_connection(("127.0.0.1", server.port))
        slow.sendall(head % 1000 + b"{")
        for n in range(20):  # ask, and go without waiting for the answer
            dead = socket.create_connection(("127.0.0.1", server.port))
            data = body(n).encode()
            dead.sendall(head % len(data) + data)
            dead.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            dead.close()
        times = [time.monotonic()]
        for _ in range(20):
            assert session.post(server.url + "/act", data=body(), timeout=10).status_code == 200
            times.append(time.monotonic())
        slow.close()
    assert times[5] - times[0] < 5
    # with Nagle's algorithm each answer on a kept connection waited 40 ms for the client's acknowledgement
    assert min(np.diff(times)[1:]) < 0.03


def test_a_record_is_gone_on_with_and_has_one_writer(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "00000007.jpg").write_bytes(b"kept")  # the seven before were deleted
    recorder = Recorder(tmp_path)
    with pytest.raises(ConfigError, match="another server writes to --record"):
        Recorder(tmp_path)
    recorder.add(Observation(picture(1), "go"), np.zeros((1, 7)), "openvla")
    recorder.close()
    assert (tmp_path / "frames" / "00000007.jpg").read_bytes() == b"kept"
    assert json.loads((tmp_path / "requests.jsonl").read_text())["frame"] == "frames/00000008.jpg"
