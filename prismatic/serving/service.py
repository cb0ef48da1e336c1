"""What every dialect hands its observations to: checks against this policy, the queue, the access log, metrics, and the record.

A dialect opens `request(...)` for each message, asks in it, and sends its answer before leaving it; so whatever is under way is known when the
server has to stop. Whatever goes wrong inside leaves as a RequestError.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np

from prismatic.policy import Policy
from prismatic.serving.batching import BatchQueue, Busy, compute
from prismatic.serving.metrics import Metrics
from prismatic.serving.observation import Limits, Observation, RequestError
from prismatic.serving.recording import Recorder
from prismatic.versions import versions

LOG = logging.getLogger("serve")
ACCESS_LOG = logging.getLogger("serve.access")
# Messages that are decoded, and images prepared, at once: it bounds memory, and leaves a core to the policy where there are three or more. At least
# two: both images of a client alone are then prepared side by side. Four on two cores cost a tenth of the throughput, two nothing that was seen.
READERS = min(4, max(2, len(os.sched_getaffinity(0)) - 1))
NO_NOOPS = "_no_noops"  # a data set's name with and without it means the same statistics
WARM_UP_SIDE = 256  # pixels


class Named(Protocol):
    """A dialect, as the log and the metrics name it."""

    name: str


@dataclass
class Request:
    """One message of a client while it is answered. timing: ms that it waited and was computed; facts: more of its line in the access log."""

    service: "Service"
    dialect: Named
    timing: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    async def ask(self, read: Callable[[], Observation | None]) -> np.ndarray | None:
        """(K, D) float32, in the data set's units, gripper 1 open … 0 close. read: decodes the message, in a thread; None: nothing is asked."""
        service, loop = self.service, asyncio.get_running_loop()
        observation = await loop.run_in_executor(service.readers, read)
        if observation is None:
            return None
        service.check(observation)
        answer = await service.queue.ask(await service.prepared(observation))
        self.timing = {"queue_ms": round(1000 * answer.waited, 2), "infer_ms": round(1000 * answer.computed, 2)}
        self.facts["rows"] = answer.rows
        if service.recorder is not None:
            service.recorder.add(observation, answer.chunk, self.dialect.name)
        return answer.chunk


class Service:
    """ready: after warm-up. draining: only what is under way is still answered."""

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        *,
        max_batch: int,
        max_wait: float,
        prepare: Callable[[np.ndarray], Any] = lambda frame: frame,
        recorder: Recorder | None = None,
    ) -> None:
        """max_wait: seconds that a request may wait for others. prepare: what the policy may be given for a frame, worked out beside it."""
        self.policy, self.limits, self.recorder, self._prepare = policy, limits, recorder, prepare
        self.metadata: dict[str, Any] = json.loads(json.dumps(policy.metadata(), default=str))
        self.metrics = Metrics()
        self.queue = BatchQueue(
            policy, max_batch=max_batch, max_wait=max_wait, max_waiting=limits.queue, on_batch=self.metrics.rows.observe
        )
        self.ready = self.draining = False
        self.under_way = 0
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")  # a large message stops nobody else's

    async def prepared(self, asked: Observation) -> Observation:
        """The same with its images as the model sees them: worked out side by side, while the policy answers others."""
        images = [asked.frame] if asked.wrist is None or self.policy.num_images == 1 else [asked.frame, asked.wrist]
        loop = asyncio.get_running_loop()
        frame, *wrist = await asyncio.gather(
            *(loop.run_in_executor(self.readers, self._prepare, image) for image in images)
        )
        return dataclasses.replace(asked, frame=frame, wrist=wrist[0] if wrist else None)

    @contextlib.asynccontextmanager
    async def request(self, dialect: Named, client: str) -> AsyncIterator[Request]:
        """Counts, logs and times one message. RequestError for whatever goes wrong in it, Busy while the server can't answer."""
        request, start, status = Request(self, dialect), time.monotonic(), 200
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
        except (asyncio.CancelledError, OSError):  # the client has gone
            status = 499
            raise
        except Exception as error:
            LOG.exception("a request failed")
            status, request.facts["error"] = 500, type(error).__name__
            raise RequestError(f"the server failed on this request ({type(error).__name__})", status=500) from error
        finally:
            self.under_way -= 1
            seconds = time.monotonic() - start
            self.metrics.request(request.dialect.name, status, seconds, self.queue.waiting)
            stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = {"time": stamp, "dialect": request.dialect.name, "client": client, "status": status}
            ACCESS_LOG.info(json.dumps({**line, "ms": round(1000 * seconds, 2), **request.timing, **request.facts}))

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

    def close_positive(self, chunk: np.ndarray) -> np.ndarray:
        """(K, D) with each gripper 1 open … 0 close → -1 open … +1 close, as the simulator's own actions are."""
        grippers = self.metadata["gripper_dims"]
        chunk = chunk.copy()
        chunk[:, grippers] = 1 - 2 * chunk[:, grippers]
        return chunk

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

    def example(self, stream: Hashable = None) -> Observation:
        """What this policy needs, in grey."""
        frame = np.full((WARM_UP_SIDE, WARM_UP_SIDE, 3), 127, np.uint8)
        dim = int(self.metadata.get("proprio_dim") or 8)
        return Observation(
            frame=frame,
            instruction="pick up the black bowl and place it on the plate",
            wrist=frame if self.policy.num_images > 1 else None,
            state=np.zeros(dim, np.float32) if self.policy.uses_state else None,
            stream=stream,
        )

    async def warm_up(self) -> list[tuple[int, float]]:
        """Answer batches of 1, 2, 4 … max_batch rows, where kernels are compiled and recorded; (rows, seconds) of each. Then ready."""
        loop, times = asyncio.get_running_loop(), []
        for rows in sorted({*(2**n for n in range(self.queue.max_batch.bit_length())), self.queue.max_batch}):
            start, examples = time.monotonic(), [self.example(("warm-up", row)) for row in range(rows)]
            await loop.run_in_executor(self.queue.thread, compute, self.policy, examples)
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
            await asyncio.to_thread(self.recorder.close)
