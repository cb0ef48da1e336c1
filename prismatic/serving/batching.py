"""The queue in front of the policy: what arrives together is answered in one batch. In: observations of any dialect. Out: (K, 7) each.

One thread computes, so a policy need not be thread-safe. While it does, requests gather; a batch waits at most `max_wait` seconds after its
first request, and only for as many as were under way together in the last second, so that a client alone never waits.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from prismatic.errors import ConfigError, PolicyError
from prismatic.policy import Policy
from prismatic.serving.observation import Observation, RequestError

RECENT = 1.0  # s; how long the largest number of requests under way is remembered


class Busy(RequestError):
    """Too many requests wait already, or the server can't answer yet or any more."""

    retry_after = 1  # s

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, status=503)


@dataclass(frozen=True)
class Answer:
    """chunk: (K, 7) float32. waited, computed: seconds in the queue and in the policy. rows: of the batch that it was part of."""

    chunk: np.ndarray
    waited: float
    computed: float
    rows: int


@dataclass
class _Request:
    observation: Observation
    stream: Hashable
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
        self._waiting: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._computing = 0
        self._peaks: deque[tuple[float, int]] = deque()  # (when, under way), falling
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def ask(self, observation: Observation, stream: Hashable) -> Answer:
        """Busy when too many wait; RequestError when the policy can't answer this one."""
        if self.waiting >= self.max_waiting:
            raise Busy(f"{self.waiting} requests wait already: try again in a moment")
        now = time.monotonic()
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(observation, stream, now, answer))
        self._note(now)
        self._arrived.set()
        return await answer

    async def run(self) -> None:
        """Answer for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._gather()
            batch = []
            while self._waiting and len(batch) < self.max_batch:
                request = self._waiting.popleft()
                if not request.answer.done():  # whoever asked may have gone
                    batch.append(request)
            if not batch:
                continue
            self._computing, started = len(batch), time.monotonic()
            results = await loop.run_in_executor(self.thread, self._compute, batch)
            self._computing, computed = 0, time.monotonic() - started
            self._on_batch(len(batch))
            for request, result in zip(batch, results, strict=True):
                if request.answer.done():
                    continue
                if isinstance(result, RequestError):
                    request.answer.set_exception(result)
                else:
                    request.answer.set_result(Answer(result, started - request.arrived, computed, len(batch)))

    async def _gather(self) -> None:
        while True:
            self._arrived.clear()
            left = None
            if self._waiting:
                now = time.monotonic()
                left = self._waiting[0].arrived + self.max_wait - now
                if left <= 0 or self.waiting >= min(self.max_batch, self._expected(now)):
                    return
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    def _note(self, now: float) -> None:
        """Remember how many requests are under way."""
        number = self.waiting + self._computing
        while self._peaks and self._peaks[-1][1] <= number:
            self._peaks.pop()
        self._peaks.append((now, number))

    def _expected(self, now: float) -> int:
        while self._peaks and self._peaks[0][0] < now - RECENT:
            self._peaks.popleft()
        return self._peaks[0][1] if self._peaks else 1

    def _compute(self, batch: list[_Request]) -> list[np.ndarray | RequestError]:
        """One batch; if it fails, its rows one by one, so that only the one at fault is refused."""
        try:
            return list(compute(self.policy, [r.observation for r in batch], [r.stream for r in batch]))
        except Exception as error:
            if len(batch) > 1:
                return [result for request in batch for result in self._compute([request])]
            if isinstance(error, (ConfigError, PolicyError)):
                return [RequestError(str(error), status=500)]
            logging.getLogger("serve").exception("the policy failed")
            return [RequestError(f"the policy failed on this request ({type(error).__name__})", status=500)]


def compute(policy: Policy, observations: Sequence[Observation], streams: Sequence[Hashable]) -> np.ndarray:
    """(B, K, 7) float32 finite. PolicyError when the policy's answer is not."""
    wrists = [o.wrist for o in observations if o.wrist is not None] if policy.num_images > 1 else None
    states = [o.state for o in observations if o.state is not None] if policy.uses_state else None
    chunks = policy.batch_chunks(
        [o.frame for o in observations], [o.instruction for o in observations], wrists, states, episodes=streams
    )
    if not np.isfinite(chunks).all():
        raise PolicyError("the policy answered with NaN or infinity: its weights or statistics are damaged")
    return chunks
