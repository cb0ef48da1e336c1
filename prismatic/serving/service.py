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
from typing import Any, TypeVar

import numpy as np

from prismatic.dataset_statistics import NO_NOOPS
from prismatic.errors import ConfigError, PolicyError
from prismatic.observation import Observation, answered
from prismatic.policy import Policy
from prismatic.policy_inputs import DAMAGED
from prismatic.serving.batching import BatchQueue
from prismatic.serving.metrics import Metrics
from prismatic.serving.observation import Limits, RequestError
from prismatic.serving.recording import Recorder, utc_now
from prismatic.versions import versions

T = TypeVar("T")
LOG = logging.getLogger("serve")
ACCESS_LOG = logging.getLogger("serve.access")
# Messages that are decoded, and images prepared, at once: it bounds memory, and leaves a core to the policy where there are three or more. At least
# two: both images of a client alone are then prepared side by side. Four on two cores cost a tenth of the throughput, two nothing that was seen.
READERS = min(4, max(2, len(os.sched_getaffinity(0)) - 1))
WarmUp = list[tuple[int, float]]  # rows of a batch, and seconds that it took
WARM_UP_SIDE = 256  # pixels
INSTRUCTION = "pick up the black bowl and place it on the plate"
# with the prompt 65 to 128 of Llama's tokens: the second width of compiled.py
LONG_INSTRUCTION = f"{INSTRUCTION}, then " * 5


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
        warm_ups: int = 1,
    ) -> None:
        """max_wait: seconds that a request may wait for others. prepare: what the policy may be given for a frame, worked out beside it.
        warm_ups: answers until a shape is as fast as it gets; a compiled policy on a GPU compiles in its first, records in its second.
        """
        self.policy, self.limits, self.recorder = policy, limits, recorder
        self._prepare, self._warm_ups = prepare, warm_ups
        self.metadata = self._read_metadata()
        self.queue = BatchQueue(policy, max_batch=max_batch, max_wait=max_wait, max_waiting=limits.queue)
        self.metrics = Metrics(self.queue.waiting)
        self.queue.on_batch = self.metrics.rows.observe
        self.ready = self.draining = False
        self.under_way = 0
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")

    def _read_metadata(self) -> dict[str, Any]:
        return json.loads(json.dumps(self.policy.metadata(), default=str))

    def in_reader(self, call: Callable[..., T], *given: Any) -> asyncio.Future[T]:
        """call(*given) in a thread: a large message stops nobody else's."""
        return asyncio.get_running_loop().run_in_executor(self._readers, call, *given)

    @contextlib.asynccontextmanager
    async def request(self, dialect: str, client: str) -> AsyncIterator[dict[str, Any]]:
        """Count, log and time one message. Yields its line of the access log, which may be changed.

        RequestError for whatever goes wrong in it, and while the server can't answer.
        """
        line: dict[str, Any] = {"time": utc_now(), "dialect": dialect, "client": client, "status": 200}
        start = time.monotonic()
        self.under_way += 1
        try:
            if not self.ready:
                raise RequestError("the policy is still warming up: try again in a moment", 503)
            if self.draining:
                raise RequestError("the server is stopping: ask another one", 503)
            yield line
        except RequestError as error:
            line |= {"status": error.status, "error": str(error)}
            raise
        except (asyncio.CancelledError, OSError):  # the client has gone
            line["status"] = 499
            raise
        except Exception as error:
            LOG.exception("a request failed")
            line |= {"status": 500, "error": type(error).__name__}
            raise RequestError(f"the server failed on this request ({type(error).__name__})", status=500) from error
        finally:
            self.under_way -= 1
            seconds = time.monotonic() - start
            self.metrics.request(line["dialect"], line["status"], seconds)
            ACCESS_LOG.info(json.dumps(line | {"ms": round(1000 * seconds, 2)}))

    async def ask(self, observation: Observation, line: dict[str, Any]) -> np.ndarray:
        """(K, D) float32, in the data set's units, gripper 1 open … 0 close. line: its line of the access log."""
        self.check(observation)
        answer = await self.queue.ask(await self.prepared(observation))
        line |= {"queue_ms": answer.queue_ms, "infer_ms": answer.infer_ms, "rows": answer.rows}
        if self.recorder is not None:
            self.recorder.add(observation, answer.chunk, line["dialect"])
        return answer.chunk

    async def prepared(self, asked: Observation) -> Observation:
        """The same with its images as the model sees them: worked out side by side, while the policy answers others."""
        images = [asked.frame] if asked.wrist is None or self.policy.num_images == 1 else [asked.frame, asked.wrist]
        frame, *wrist = await asyncio.gather(*(self.in_reader(self._prepare, image) for image in images))
        return dataclasses.replace(asked, frame=frame, wrist=wrist[0] if wrist else None)

    def check(self, observation: Observation) -> None:
        """RequestError for what this policy needs and the client didn't send, or for other statistics than its own."""
        if self.policy.num_images > 1 and observation.wrist is None:
            raise RequestError("this policy looks at two images: send the wrist camera's too")
        dim, state = self.metadata["proprio_dim"], observation.state
        if dim and (state is None or len(state) != dim):
            given = "none" if state is None else f"one of {len(state)}"
            raise RequestError(f"this policy reads the robot's state, {dim} numbers: send it, this request has {given}")
        own, asked = self.metadata["unnorm_key"], observation.unnorm_key  # with and without NO_NOOPS is the same
        if asked and asked.removesuffix(NO_NOOPS) != own.removesuffix(NO_NOOPS):
            raise RequestError(f"unnorm_key {asked!r} is not served here: this policy acts with {own!r}")

    def close_positive(self, chunk: np.ndarray) -> np.ndarray:
        """(K, D) with each gripper 1 open … 0 close → -1 open … +1 close, as the simulator's own actions are."""
        grippers = self.metadata["gripper_dims"]
        chunk = chunk.copy()
        chunk[:, grippers] = 1 - 2 * chunk[:, grippers]
        return chunk

    def describe(self) -> dict[str, Any]:
        """The policy's metadata, what it needs, what it answers, what the server takes, and versions."""
        self.metadata = self._read_metadata()  # what could be compiled is known only after a while
        return {
            **self.metadata,
            "num_images": self.policy.num_images,
            "uses_state": self.policy.uses_state,
            "limits": dataclasses.asdict(self.limits),
            "max_batch": self.queue.max_batch,
            "max_wait_ms": 1000 * self.queue.max_wait,
            "versions": versions(),
        }

    def example(self, stream: Hashable = None, instruction: str = INSTRUCTION) -> Observation:
        """What this policy needs, in grey."""
        frame = np.full((WARM_UP_SIDE, WARM_UP_SIDE, 3), 127, np.uint8)
        return Observation(
            frame=frame,
            instruction=instruction,
            wrist=frame if self.policy.num_images > 1 else None,
            state=np.zeros(self.metadata["proprio_dim"], np.float32) if self.policy.uses_state else None,
            stream=stream,
        )

    async def warm_up(self) -> WarmUp:
        """Answer batches of max_batch … 4, 2, 1 rows, each as often as it takes until all is compiled and recorded. Then ready.

        The largest first: what was recorded before its cache was made would be recorded anew. What is compiled is compiled for long
        instructions too (a second width): else the first of them would keep all clients waiting. A size for which the GPU has no memory is
        said, and the next smaller one is the largest from there on. ConfigError where not even one row can be answered.
        """
        loop, times, most = asyncio.get_running_loop(), [], self.queue.max_batch
        for rows in sorted({*(2**n for n in range(most.bit_length())), most}, reverse=True):
            examples = [self.example(("warm-up", row)) for row in range(rows)]
            longer = [self.example(("warm-up", row), LONG_INSTRUCTION) for row in range(rows)]
            try:
                for asked in [longer, examples] * (self._warm_ups - 1):
                    await loop.run_in_executor(self.queue.thread, answered, self.policy, asked)
                start = time.monotonic()
                await loop.run_in_executor(self.queue.thread, answered, self.policy, examples)
            except PolicyError as error:  # no request's fault: the weights are damaged, or so many rows don't fit
                if rows == 1 or str(error) == DAMAGED:
                    raise ConfigError(str(error)) from None
                self.queue.max_batch = 1 << (rows - 1).bit_length() - 1  # the next smaller size
                LOG.warning("%s: --max_batch is %d from here on", error, self.queue.max_batch)
                continue
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
