"""What every dialect hands its observations to: checks against this policy, the queue, the access log, metrics, and the record.

A dialect opens `request(...)` for each message, asks in it, and sends its answer before leaving it; so whatever is under way is known when the
server has to stop. Whatever goes wrong inside leaves as a RequestError.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from anyio import CapacityLimiter, to_thread

from prismatic.policy import Policy
from prismatic.serving.batching import Answer, BatchQueue, Busy, compute
from prismatic.serving.metrics import Metrics
from prismatic.serving.observation import Limits, Observation, RequestError
from prismatic.serving.recording import Recorder
from prismatic.versions import versions

LOG = logging.getLogger("serve")
ACCESS_LOG = logging.getLogger("serve.access")
READERS = 4  # messages that are decoded at once: it bounds memory
NO_NOOPS = "_no_noops"  # a data set's name with and without it means the same statistics
WARM_UP_SIDE = 256  # pixels


@dataclass
class Request:
    """One message of a client while it is answered."""

    service: "Service"
    dialect: str
    client: str
    stream: Hashable = None
    answer: Answer | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # more of its line in the access log

    async def ask(self, observation: Observation, stream: Hashable = None) -> np.ndarray:
        """(K, 7) float32, in the data set's units, gripper 1 open … 0 close. stream: the same while one robot goes on, None: no draft."""
        service = self.service
        service.check(observation)
        prepared = await service.in_thread(service.prepared, observation)
        self.stream, self.answer = stream, await service.queue.ask(prepared, stream)
        if service.recorder is not None:
            service.recorder.add(observation, self.answer.chunk, dialect=self.dialect, stream=stream)
        return self.answer.chunk

    def timing(self) -> dict[str, float]:
        """ms that the answer waited and was computed."""
        if self.answer is None:
            return {}
        return {"queue_ms": round(1000 * self.answer.waited, 2), "infer_ms": round(1000 * self.answer.computed, 2)}


class Service:
    """ready: after warm-up. draining: only what is under way is still answered."""

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        *,
        max_batch: int,
        max_wait: float,
        prepare: Callable[[np.ndarray], Any] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """max_wait: seconds that a request may wait for others. prepare: what the policy may be given for a frame, worked out beside it."""
        self.policy, self.limits, self.recorder, self._prepare = policy, limits, recorder, prepare
        self.metadata: dict[str, Any] = json.loads(json.dumps(policy.metadata(), default=str))
        self.metrics = Metrics()
        self.queue = BatchQueue(
            policy, max_batch=max_batch, max_wait=max_wait, max_waiting=limits.queue, on_batch=self.metrics.batch
        )
        self.ready = self.draining = False
        self.under_way = 0
        self._readers = CapacityLimiter(READERS)
        self._connections = itertools.count()

    def connection(self) -> int:
        """A number that no other connection has."""
        return next(self._connections)

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Decode bytes or prepare images in a thread, so that a large message stops nobody else's."""
        return await to_thread.run_sync(lambda: work(*arguments), limiter=self._readers)

    def prepared(self, observation: Observation) -> Observation:
        """Its images as the policy's model sees them, while the policy answers others."""
        if self._prepare is None:
            return observation
        wrist = observation.wrist if self.policy.num_images > 1 else None
        images = (None if frame is None else self._prepare(frame) for frame in (observation.frame, wrist))
        return dataclasses.replace(observation, **dict(zip(("frame", "wrist"), images, strict=True)))

    @contextlib.asynccontextmanager
    async def request(self, dialect: str, client: str) -> AsyncIterator[Request]:
        """Counts, logs and times one message. RequestError for whatever goes wrong in it, Busy while the server can't answer."""
        request, start, status = Request(self, dialect, client), time.monotonic(), 200
        self.under_way += 1
        try:
            if not self.ready:
                raise Busy("the policy is still warming up: try again in a moment")
            if self.draining:
                raise Busy("the server is stopping: ask another one")
            yield request
        except RequestError as error:
            status, request.facts["error"] = error.status, str(error)
            raise
        except (asyncio.CancelledError, OSError, EOFError):  # the client has gone
            status = 499
            raise
        except Exception as error:
            LOG.exception("a request failed")
            status, request.facts["error"] = 500, type(error).__name__
            raise RequestError(f"the server failed on this request ({type(error).__name__})", status=500) from error
        finally:
            self.under_way -= 1
            seconds = time.monotonic() - start
            self.metrics.request(request.dialect, status, seconds, self.queue.waiting)
            rows = {} if request.answer is None else {"rows": request.answer.rows}
            line = {"dialect": request.dialect, "client": client, "status": status, "ms": round(1000 * seconds, 2)}
            stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
            ACCESS_LOG.info(json.dumps({"time": stamp, **line, **request.timing(), **rows, **request.facts}))

    def check(self, observation: Observation) -> None:
        """RequestError for what this policy needs and the client didn't send, or for other statistics than its own."""
        if self.policy.num_images > 1 and observation.wrist is None:
            raise RequestError("this policy looks at two images: send the wrist camera's too")
        if self.policy.uses_state and observation.state is None:
            raise RequestError("this policy reads the robot's state: send it too")
        dim = self.metadata.get("proprio_dim")
        if self.policy.uses_state and observation.state is not None and dim and len(observation.state) != dim:
            raise RequestError(f"this policy reads a state of {dim} numbers, not of {len(observation.state)}")
        own, asked = self.metadata.get("unnorm_key"), observation.unnorm_key
        if asked and own and asked.removesuffix(NO_NOOPS) != str(own).removesuffix(NO_NOOPS):
            raise RequestError(f"unnorm_key {asked!r} is not served here: this policy acts with {own!r}")

    def describe(self) -> dict[str, Any]:
        """The policy's metadata, what it needs, what it answers, what the server takes, and versions."""
        return {
            **self.metadata,
            "num_images": self.policy.num_images,
            "num_actions_chunk": self.policy.num_actions_chunk,
            "uses_state": self.policy.uses_state,
            "limits": dataclasses.asdict(self.limits),
            "max_batch": self.queue.max_batch,
            "max_wait_ms": 1000 * self.queue.max_wait,
            "versions": versions(),
        }

    def example(self) -> Observation:
        """What this policy needs, in grey."""
        frame = np.full((WARM_UP_SIDE, WARM_UP_SIDE, 3), 127, np.uint8)
        dim = int(self.metadata.get("proprio_dim") or 8)
        return Observation(
            frame=frame,
            instruction="pick up the black bowl and place it on the plate",
            wrist=frame if self.policy.num_images > 1 else None,
            state=np.zeros(dim, np.float32) if self.policy.uses_state else None,
        )

    async def warm_up(self) -> list[tuple[int, float]]:
        """Answer batches of 1, 2, 4 … max_batch rows, where kernels are compiled and recorded; (rows, seconds) of each. Then ready."""
        loop, times = asyncio.get_running_loop(), []
        sizes = sorted({*(2**n for n in range(self.queue.max_batch.bit_length())), self.queue.max_batch})
        for rows in sizes:
            start = time.monotonic()
            await loop.run_in_executor(
                self.queue.thread, compute, self.policy, [self.example()] * rows, [("warm-up", n) for n in range(rows)]
            )
            times.append((rows, time.monotonic() - start))
        self.ready = True
        return times

    async def drain(self, seconds: float) -> None:
        """Answer what is under way, nothing new."""
        self.draining = True
        end = time.monotonic() + seconds
        while self.under_way and time.monotonic() < end:
            await asyncio.sleep(0.01)
        if self.recorder is not None:
            await to_thread.run_sync(self.recorder.close)
