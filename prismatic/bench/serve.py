"""How fast and how firm is a server? In: a checkpoint. Out: a row a question, with its target.

The server is serve.py in a process of its own; its clients are threads here, which take a share of the same cores. Latency is compared in turns:
a call of the policy in this process, then a request, and so on, because a machine's speed changes under one's hands. On a CPU the
model has one thread, here and there, so that the images of the next batch are prepared beside it.
"""

import contextlib
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from websockets.sync.client import connect

from prismatic import machine
from prismatic.policy import Policy
from prismatic.serving.codec import bytes_keys, json_array, string_keys, write_msgpack
from prismatic.serving.vla_eval import envelope

SIDE = 256  # pixels of a frame, as LIBERO's
WORDS = "pick up the black bowl next to the ramekin and place it on the plate"
TIME_LIMIT = 30.0  # s that a client waits
Ask = Callable[[], None]


def run(
    checkpoint: str, *, clients: int, seconds: float, pairs: int, hostile: int, requests: int
) -> list[dict[str, Any]]:
    """pairs: calls compared one by one. hostile, requests: how many of each."""
    import torch

    from prismatic.checkpoint import load_policy

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    policy = load_policy(checkpoint)
    rows: list[dict[str, Any]] = []

    def add(question: str, value: float, unit: str, target: str) -> None:
        rows.append({"what": question, "value": round(value, 2), "unit": unit, "target": target})

    with server(checkpoint) as (port, pid):
        alone, served = compare(policy, port, pairs)
        add("policy(...), median", 1000 * alone, "ms", "")
        add("added by the server, median of one client", 1000 * (served - alone), "ms", "≤ 5")
        single = load(policy, port, 1, seconds / 4)
        before = batches(port)
        together = load(policy, port, clients, seconds)
        after = batches(port)
        add("one request at a time", single["rate"], "1/s", "")
        add(f"{clients} clients of mixed dialects", together["rate"], "1/s", "")
        add("throughput against one at a time", together["rate"] / single["rate"], "x", "≥ 2")
        add("rows of a batch, mean", (after[1] - before[1]) / (after[0] - before[0]), "", "> 4")
        add("slowest answer", together["slowest"], "s", "")
        add("errors", together["errors"] + single["errors"], "", "0")
        held = machine.resident(pid=pid)
        flood(port, requests)
        add(f"memory after {requests:,} requests more", (machine.resident(pid=pid) - held) / 2**20, "MiB", "flat")
        waits = attack(policy, port, hostile)
        add(f"slowest answer beside {hostile:,} hostile requests", max(waits), "s", f"< {TIME_LIMIT:g}")
        add("good answers meanwhile", len(waits), "", "")
    return rows


@contextlib.contextmanager
def server(checkpoint: str) -> Iterator[tuple[int, int]]:
    """Port and process id of a warm serve.py."""
    command = [
        sys.executable,
        str(Path(__file__).parents[2] / "serve.py"),
        "--pretrained_checkpoint",
        checkpoint,
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        command,
        env={"OMP_NUM_THREADS": "1"} | dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("curl"):
                found = re.search(r":(\d+)/", line)
                assert found is not None
                yield int(found[1]), process.pid
                break
        else:
            raise RuntimeError("serve.py ended before it was ready")
        if process.poll() is not None:
            raise RuntimeError(f"serve.py ended with {process.returncode} while it was measured")
    finally:
        process.terminate()
        process.wait()


def images(policy: Policy, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """A frame, and a wrist's for policies that look at one."""
    frames = generator.integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    return frames[0], frames[1] if policy.num_images > 1 else None


@contextlib.contextmanager
def client(policy: Policy, port: int, number: int) -> Iterator[Ask]:
    """A client of one of the four kinds; each call is one request, and an error unless it is answered."""
    frame, wrist = images(policy, np.random.default_rng(number))
    state = np.zeros(8) if policy.uses_state else None
    kind = number % 4
    if kind < 2:
        fields = {"image" if kind == 0 else "full_image": frame, "wrist_image": wrist, "state": state}
        body = {name: json_array(array) for name, array in fields.items() if array is not None}
        data = json.dumps(body | {"instruction": WORDS, "session": str(number)})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIME_LIMIT)

        def post() -> None:
            connection.request("POST", "/act", data)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise RuntimeError(text)

        yield post
        connection.close()
        return
    with connect(f"ws://127.0.0.1:{port}/{'vla-eval' * (kind == 3)}", max_size=None) as socket:
        if kind == 2:
            socket.recv()
            given = {
                "observation/image": frame,
                "observation/wrist_image": wrist,
                "observation/state": state,
                "prompt": WORDS,
            }
            message = write_msgpack(given, bytes_keys)
        else:
            cameras = {"agentview": frame, "wrist": wrist}
            payload = {
                "images": {k: v for k, v in cameras.items() if v is not None},
                "task_description": WORDS,
                "states": state,
            }
            message = write_msgpack(envelope("observation", payload, 1), string_keys)

        def send() -> None:
            socket.send(message)
            answer = msgpack.unpackb(socket.recv(TIME_LIMIT))
            if "actions" not in answer.get("payload", answer):
                raise RuntimeError(str(answer))

        yield send


def compare(policy: Policy, port: int, pairs: int) -> tuple[float, float]:
    """Median seconds of a call here and of a request, asked in turns."""
    frame, wrist = images(policy, np.random.default_rng(0))
    state = np.zeros(8, np.float32) if policy.uses_state else None
    times: tuple[list[float], list[float]] = ([], [])
    with client(policy, port, 0) as ask:
        for _ in range(pairs + 2):
            for taken, call in zip(
                times, (lambda: policy(frame, WORDS, wrist, state, episode="bench"), ask), strict=True
            ):
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
    return statistics.median(times[0][2:]), statistics.median(times[1][2:])


def load(policy: Policy, port: int, clients: int, seconds: float) -> dict[str, float]:
    """So many clients, each asking again as soon as it is answered."""
    end = time.monotonic() + seconds

    def work(number: int) -> tuple[int, int, float]:
        answered, errors, slowest = 0, 0, 0.0
        with client(policy, port, number) as ask:
            while (start := time.monotonic()) < end:
                try:
                    ask()
                    answered += 1
                except Exception:
                    errors += 1
                slowest = max(slowest, time.monotonic() - start)
        return answered, errors, slowest

    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(work, range(clients)))
    answered, errors, slowest = zip(*found, strict=True)
    return {"rate": sum(answered) / seconds, "errors": sum(errors), "slowest": max(slowest)}


def batches(port: int) -> tuple[float, float]:
    """Batches so far, and their rows."""
    text = fetch(port, "/metrics").decode()
    found = [re.search(rf"^serve_batch_rows_{name} (\S+)", text, re.M) for name in ("count", "sum")]
    count, rows = (float(one[1]) if one else 0.0 for one in found)
    return count, rows


def fetch(port: int, path: str, body: bytes | None = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIME_LIMIT)
    connection.request("GET" if body is None else "POST", path, body)
    answer = connection.getresponse().read()
    connection.close()
    return answer


def flood(port: int, requests: int) -> None:
    """Requests that are read and refused, each on a connection of its own: what is held for one would show."""
    frame = json_array(np.zeros((SIDE, SIDE, 3), np.uint8))
    body = json.dumps({"image": frame, "wrist_image": frame, "instruction": WORDS, "unnorm_key": "another"}).encode()
    for _ in range(requests):
        fetch(port, "/act", body)


def attack(policy: Policy, port: int, hostile: int) -> list[float]:
    """Damaged and random requests; seconds that a well-behaved client waited meanwhile, each time."""
    generator, waits, stop = random.Random(0), [], threading.Event()
    body = fetch(port, "/example")

    def behave() -> None:
        with client(policy, port, 0) as ask:
            while not stop.is_set():
                start = time.monotonic()
                ask()
                waits.append(time.monotonic() - start)

    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(behave)
        try:
            for number in range(hostile):
                if good.done():
                    break
                noise = bytearray(body[: generator.randrange(1, len(body))] if number % 3 else generator.randbytes(300))
                noise[generator.randrange(min(len(noise), 500))] = generator.randrange(256)
                with contextlib.suppress(Exception):  # however the server answers
                    if number % 2:
                        fetch(port, "/act", bytes(noise))
                    else:
                        with connect(f"ws://127.0.0.1:{port}/{'vla-eval' * (number % 4 == 0)}") as socket:
                            socket.send(bytes(noise[:5000]))
                            socket.recv(1)
        finally:
            stop.set()
        good.result()
    return waits
