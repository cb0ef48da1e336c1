"""The queue in front of the policy: what arrives together is answered in one batch. In: observations of any dialect. Out: (K, D) each.

One thread computes, so a policy need not be thread-safe. While it does, requests gather; a batch waits at most `max_wait` seconds after its
first request, and only for as many as were under way when the last one was answered, so that a client alone never waits.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from prismatic.errors import ConfigError, PolicyError
from prismatic.policy import Policy
from prismatic.serving.observation import Observation, RequestError


class Busy(RequestError):
    """Too many requests wait already, or the server can't answer yet or any more."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, status=503)


@dataclass(frozen=True)
class Answer:
    """chunk: (K, D) float32. waited, computed: seconds in the queue and in the policy. rows: of the batch that it was part of."""

    chunk: np.ndarray
    waited: float
    computed: float
    rows: int


@dataclass
class _Waiting:
    observation: Observation
    arrived: float
    answer: asyncio.Future[Answer]


class BatchQueue:
    """ask() from any task of one event loop, while run() runs in it."""

    def __init__(
        self, policy: Policy, *, max_batch: int, max_wait: float, max_waiting: int, on_batch: Callable[[int], None]
    ) -> None:
        """max_wait: seconds. on_batch: is told the rows of each batch, in the event loop."""
        self.policy, self.max_batch, self.max_wait, self.max_waiting = policy, max_batch, max_wait, max_waiting
        self._on_batch = on_batch
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._expected = 1  # requests that are worth waiting for
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def ask(self, observation: Observation) -> Answer:
        """Busy when too many wait; RequestError when the policy can't answer this one."""
        if self.waiting >= self.max_waiting:
            raise Busy(f"{self.waiting} requests wait already: try again in a moment")
        request = _Waiting(observation, time.monotonic(), asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._arrived.set()
        return await request.answer

    async def run(self) -> None:
        """Answer for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._gather()
            taken = [self._waiting.popleft() for _ in range(min(self.waiting, self.max_batch))]
            batch = [request for request in taken if not request.answer.done()]  # whoever asked may have gone
            if not batch:
                continue
            started = time.monotonic()
            results = await loop.run_in_executor(self.thread, self._compute, batch)
            computed = time.monotonic() - started
            self._expected = len(batch) + self.waiting
            self._on_batch(len(batch))
            for request, result in zip(batch, results, strict=True):
                if request.answer.done():
                    continue
                if isinstance(result, RequestError):
                    request.answer.set_exception(result)
                else:
                    request.answer.set_result(Answer(result, started - request.arrived, computed, len(batch)))

    async def _gather(self) -> None:
        """Return when a batch is worth computing."""
        while self.waiting < min(self.max_batch, self._expected):
            self._arrived.clear()
            left = self._waiting[0].arrived + self.max_wait - time.monotonic() if self._waiting else None
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    def _compute(self, batch: Sequence[_Waiting]) -> list[np.ndarray | RequestError]:
        """One batch; if it fails, its rows one by one, so that only the one at fault is refused."""
        try:
            return list(compute(self.policy, [request.observation for request in batch]))
        except Exception as error:
            if len(batch) > 1:
                return [result for request in batch for result in self._compute([request])]
            if isinstance(error, (ConfigError, PolicyError)):
                return [RequestError(str(error), status=500)]
            logging.getLogger("serve").exception("the policy failed")
            return [RequestError(f"the policy failed on this request ({type(error).__name__})", status=500)]


def compute(policy: Policy, observations: Sequence[Observation]) -> np.ndarray:
    """(B, K, D) float32 finite. PolicyError when the policy's answer is not."""
    wrists = [o.wrist for o in observations if o.wrist is not None] if policy.num_images > 1 else None
    states = [o.state for o in observations if o.state is not None] if policy.uses_state else None
    chunks = policy.batch_chunks(
        [o.frame for o in observations],
        [o.instruction for o in observations],
        wrists,
        states,
        episodes=[o.stream for o in observations],
    )
    if not np.isfinite(chunks).all():
        raise PolicyError("the policy answered with NaN or infinity: its weights or statistics are damaged")
    return chunks
