"""A real server on a free port of this machine, in a thread of the test's process, and what its clients send."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import json_numpy
import requests

from prismatic.policy import Policy
from prismatic.serving.app import Server
from prismatic.serving.observation import Limits
from prismatic.serving.recording import Recorder
from prismatic.serving.service import Service
from serve import bind
from tests.fake_policy import picture


@dataclass
class Live:
    server: Server
    port: int

    @property
    def service(self) -> Service:
        return self.server.service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=10)

    def act(self, data: Any, **headers: str) -> requests.Response:
        """POST /act as OpenVLA's clients do, without a Content-Type."""
        return requests.post(self.url + "/act", data=data, headers=headers, timeout=10)


def fields(seed: int = 1, words: str = "go") -> dict[str, Any]:
    """A request of OpenVLA's dialect, with the wrist's image."""
    return {"image": picture(seed), "wrist_image": picture(seed + 1000), "instruction": words}


def body(seed: int = 1, words: str = "go") -> str:
    return json_numpy.dumps(fields(seed, words))


def openpi(seed: int = 1, words: str = "go") -> dict[str, Any]:
    """The same in openpi's dialect."""
    return {"observation/image": picture(seed), "observation/wrist_image": picture(seed + 1000), "prompt": words}


@contextlib.contextmanager
def live(
    policy: Policy,
    *,
    limits: Limits | None = None,
    key: str | None = None,
    max_batch: int = 16,
    record: Path | None = None,
    warm: bool = True,
    prepare: Callable[[Any], Any] = lambda frame: frame,
) -> Iterator[Live]:
    """warm: wait until it answers."""
    listener = bind("127.0.0.1", 0)
    recorder = None if record is None else Recorder(record)
    how: dict[str, Any] = {"max_batch": max_batch, "max_wait": 0.005, "prepare": prepare, "recorder": recorder}
    server = Server(Service(policy, limits or Limits(), **how), key, stop_seconds=5)
    ready = threading.Event()
    work = server.run_until_stopped(listener, lambda times: ready.set())
    thread = threading.Thread(target=asyncio.run, args=(work,), daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        assert not warm or ready.wait(30)
        yield Live(server, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server doesn't stop"
