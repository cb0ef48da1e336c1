"""How fast and how firm is a server? In: a checkpoint. Out: a row a question, with its target.

The server is serve.py in a process of its own; its clients are threads here, which take a share of the same cores. Latency is compared in turns:
a call of the policy in this process, then a request, and so on, because a machine's speed changes under one's hands. On a CPU the
model has one thread, here and there, so that the images of the next batch are prepared beside it.
"""

import contextlib
import http.client
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import torch
from PIL import Image
from websockets.sync.client import connect

from prismatic import machine
from prismatic.bench.instruments import Row, seconds_in_turns
from prismatic.checkpoint import load_policy
from prismatic.errors import ConfigError
from prismatic.observation import Observation
from prismatic.policy import Policy
from prismatic.serving.codec import bytes_keys, string_keys, write_msgpack
from prismatic.serving.openvla import write_request
from prismatic.serving.vla_eval import envelope

SIDE = 256  # pixels of a frame, as LIBERO's
TASK = "pick up the black bowl next to the ramekin and place it on the plate"
TIME_LIMIT = 30.0  # s that a client waits
READY = re.compile(r"curl.*:(\d+)/")  # the line of serve.py's output that names its port


def run(checkpoint: str, *, clients: int, seconds: float, pairs: int, hostile: int, requests: int) -> list[Row]:
    """pairs: calls compared one by one. hostile, requests: how many of each."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    policy = load_policy(checkpoint)
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < (needed := torch.cuda.memory_allocated()):
        raise ConfigError(
            f"serve.py would hold {checkpoint} a second time, {needed / 1e9:.1f} GB, and the GPU has no room: give a smaller one"
        )
    rows: list[Row] = []

    def add(question: str, value: float, unit: str = "", target: str = "") -> None:
        rows.append({"what": question, "value": round(value, 2), "unit": unit, "target": target})

    with server(checkpoint) as (port, pid):
        alone, served = compare(policy, port, pairs)
        add("policy(...), median", 1000 * alone, "ms")
        add("added by the server, median of one client", 1000 * (served - alone), "ms", "≤ 5")
        single, before = load(policy, port, 1, seconds / 4), batches(port)
        together, after = load(policy, port, clients, seconds), batches(port)
        add("one request at a time", single["rate"], "1/s")
        add(f"{clients} clients of mixed dialects", together["rate"], "1/s")
        add("throughput against one at a time", together["rate"] / single["rate"], "x", "≥ 2")
        add("rows of a batch, mean", (after[1] - before[1]) / (after[0] - before[0]), "", "> 4")
        add("slowest answer", together["slowest"], "s")
        add("errors", together["errors"] + single["errors"], "", "0")
        held = machine.resident(pid=pid)
        flood(port, requests)
        add(f"memory after {requests:,} requests more", (machine.resident(pid=pid) - held) / 2**20, "MiB", "flat")
        waits = attack(policy, port, hostile)
        add(f"slowest answer beside {hostile:,} hostile requests", max(waits), "s", f"< {TIME_LIMIT:g}")
        add("good answers meanwhile", len(waits))
    return rows


@contextlib.contextmanager
def server(checkpoint: str) -> Iterator[tuple[int, int]]:
    """Port and process id of a warm serve.py."""
    script = str(Path(__file__).parents[2] / "serve.py")
    command = [sys.executable, script, "--pretrained_checkpoint", checkpoint, "--port", "0"]
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            found = next(filter(None, map(READY.match, process.stdout or ())), None)
            if found is None:
                log.seek(0)
                why = [line for line in log.read().splitlines() if line.strip()][-1:]
                raise RuntimeError(
                    f"serve.py, which holds the model a second time, ended before it was ready: {''.join(why)}"
                )
            yield int(found[1]), process.pid
            if process.poll() is not None:
                raise RuntimeError(f"serve.py ended with {process.returncode} while it was measured")
        finally:
            process.terminate()


def observation(policy: Policy, seed: int) -> Observation:
    """What the policy looks at: as smooth as a camera's image, since noise makes JPEG slow."""
    coarse = np.random.default_rng(seed).integers(0, 256, (2, SIDE // 16, SIDE // 16, 3), dtype=np.uint8)
    frame, wrist = (np.asarray(Image.fromarray(image).resize((SIDE, SIDE))) for image in coarse)
    state = np.zeros(8, np.float32) if policy.uses_state else None
    return Observation(frame, TASK, wrist=wrist if policy.num_images > 1 else None, state=state)


@contextlib.contextmanager
def client(policy: Policy, port: int, number: int) -> Iterator[Callable[[], None]]:
    """A client of one of the four dialects (OpenVLA, OpenVLA-OFT, openpi, vla-eval); each call is one request, and an error unless answered."""
    seen, kind = observation(policy, number), number % 4
    if kind < 2:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIME_LIMIT)
        body = write_request(seen, frame=("image", "full_image")[kind], session=str(number))

        def post() -> None:
            connection.request("POST", "/act", body)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise RuntimeError(text)

        yield post
        connection.close()
        return
    if kind == 2:
        given = {"image": seen.frame, "wrist_image": seen.wrist, "state": seen.state}
        message = write_msgpack({f"observation/{k}": v for k, v in given.items()} | {"prompt": TASK}, bytes_keys)
    else:
        images = {"agentview": seen.frame} | ({} if seen.wrist is None else {"wrist": seen.wrist})
        payload = {"images": images, "task_description": TASK, "states": seen.state}
        message = write_msgpack(envelope("observation", payload, 1), string_keys)
    with connect(f"ws://127.0.0.1:{port}", max_size=None) as socket:
        socket.recv()  # the server speaks first

        def send() -> None:
            socket.send(message)
            answer = msgpack.unpackb(socket.recv(TIME_LIMIT))
            if "actions" not in answer.get("payload", answer):
                raise RuntimeError(str(answer))

        yield send


def compare(policy: Policy, port: int, pairs: int) -> tuple[float, float]:
    """Median seconds of a call here and of a request, asked in turns."""
    seen = observation(policy, 0)
    with client(policy, port, 0) as ask:
        calls = {"here": lambda: policy(seen.frame, TASK, seen.wrist, seen.state, episode="bench"), "served": ask}
        times = seconds_in_turns(calls, pairs + 2, torch.device("cpu"))
    return float(times["here"][2:].median()), float(times["served"][2:].median())


def load(policy: Policy, port: int, clients: int, seconds: float) -> dict[str, float]:
    """So many clients, each asking again as soon as it is answered."""
    end, taken, errors = time.monotonic() + seconds, [], []

    def work(number: int) -> None:
        with client(policy, port, number) as ask:
            while (start := time.monotonic()) < end:
                try:
                    ask()
                except Exception as error:
                    errors.append(error)
                taken.append(time.monotonic() - start)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    return {"rate": (len(taken) - len(errors)) / seconds, "errors": len(errors), "slowest": max(taken)}


def batches(port: int) -> tuple[float, float]:
    """Batches so far, and their rows."""
    found = dict(re.findall(r"^serve_batch_rows_(count|sum) (\S+)", fetch(port, "/metrics").decode(), re.M))
    return float(found.get("count", 0)), float(found.get("sum", 0))


def fetch(port: int, path: str, body: bytes | None = None) -> bytes:
    """The answer to one request on a connection of its own, whatever its status."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIME_LIMIT)) as connection:
        connection.request("GET" if body is None else "POST", path, body)
        return connection.getresponse().read()


def flood(port: int, requests: int) -> None:
    """Requests that are read and refused, each on a connection of its own: what is held for one would show."""
    frame = np.zeros((SIDE, SIDE, 3), np.uint8)
    body = write_request(Observation(frame, TASK, wrist=frame), unnorm_key="another")
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
                        socket.recv(1)
                        socket.send(bytes(noise[:5000]))
                        socket.recv(1)
        stop.set()
        good.result()
    return waits
