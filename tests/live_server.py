"""A real server on a free port of this machine, in a thread of the test's process."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismatic.policy import Policy
from prismatic.serving.app import Server
from prismatic.serving.observation import Limits
from prismatic.serving.recording import Recorder
from prismatic.serving.service import Service
from serve import bind


@dataclass
class Live:
    """loop: of the server, for what must run in it."""

    service: Service
    server: Server
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """As a signal does."""
        self.server.should_exit = True


@contextlib.contextmanager
def live(
    policy: Policy,
    *,
    limits: Limits | None = None,
    key: str | None = None,
    max_batch: int = 16,
    max_wait: float = 0.005,
    record: Path | None = None,
    warm: bool = True,
) -> Iterator[Live]:
    listener = bind("127.0.0.1", 0)
    recorder = None if record is None else Recorder(record)
    started: list[Live] = []
    up = threading.Event()

    async def main() -> None:
        service = Service(policy, limits or Limits(), max_batch=max_batch, max_wait=max_wait, recorder=recorder)
        server = Server(service, key, stop_seconds=5)
        worker = asyncio.create_task(work(service))
        started.append(Live(service, server, listener.getsockname()[1], asyncio.get_running_loop()))
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started or (warm and not service.ready):
            await asyncio.sleep(0.01)
        up.set()
        await serving
        worker.cancel()

    async def work(service: Service) -> Any:
        if warm:
            await service.warm_up()
        await service.queue.run()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert up.wait(30)
    try:
        yield started[0]
    finally:
        started[0].stop()
        thread.join(20)
        assert not thread.is_alive(), "the server doesn't stop"
