"""The queue in front of the policy: what arrives together is answered in one batch. In: observations of any dialect. Out: (K, D) each.

One thread computes, so a policy need not be thread-safe. While it does, requests gather; a batch waits at most `max_wait` seconds after its
first request, and only for as many as were under way when the last one was answered, so that a client alone never waits.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from prismatic.errors import ConfigError, PolicyError
from prismatic.observation import Observation, answered
from prismatic.policy import Policy
from prismatic.policy_inputs import InputError
from prismatic.serving.observation import RequestError


@dataclass(frozen=True)
class Answer:
    """chunk: (K, D) float32. queue_ms, infer_ms: spent waiting and in the policy. rows: of the batch that it was part of."""

    chunk: np.ndarray
    queue_ms: float
    infer_ms: float
    rows: int


@dataclass
class _Waiting:
    observation: Observation
    arrived: float
    answer: asyncio.Future[Answer]


class BatchQueue:
    """ask() from any task of one event loop, while run() runs in it."""

    def __init__(self, policy: Policy, *, max_batch: int, max_wait: float, max_waiting: int) -> None:
        """max_wait: seconds. on_batch may be set: it is told the rows of each batch, in the event loop."""
        self.policy, self.max_batch, self.max_wait = policy, max_batch, max_wait
        self.on_batch: Callable[[int], None] = lambda rows: None
        self._requests: asyncio.Queue[_Waiting] = asyncio.Queue(max_waiting)
        self.waiting = self._requests.qsize
        self._expected = 1  # requests that are worth waiting for
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    async def ask(self, observation: Observation) -> Answer:
        """RequestError when too many wait, or the policy can't answer this one."""
        request = _Waiting(observation, time.monotonic(), asyncio.get_running_loop().create_future())
        try:
            self._requests.put_nowait(request)
        except asyncio.QueueFull:
            raise RequestError(f"{self.waiting()} requests wait already: try again in a moment", 503) from None
        return await request.answer

    async def run(self) -> None:
        """Answer for ever, or until the GPU fails, which is raised."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [request for request in await self._gather() if not request.answer.done()]
            if not batch:  # whoever asked has gone
                continue
            started = time.monotonic()
            try:
                results = await loop.run_in_executor(self.thread, self._compute, batch)
            except Exception:
                for request in [*batch, *(self._requests.get_nowait() for _ in range(self.waiting()))]:
                    if not request.answer.done():
                        request.answer.set_exception(RequestError("the GPU has failed: ask another server", 503))
                raise
            infer_ms = 1000 * (time.monotonic() - started)
            self._expected = len(batch) + self.waiting()
            self.on_batch(len(batch))
            for request, result in zip(batch, results, strict=True):
                if request.answer.done():
                    continue
                if isinstance(result, RequestError):
                    request.answer.set_exception(result)
                else:
                    queue_ms = 1000 * (started - request.arrived)
                    request.answer.set_result(Answer(result, round(queue_ms, 2), round(infer_ms, 2), len(batch)))

    async def _gather(self) -> list[_Waiting]:
        """The next batch, once it is worth computing."""
        batch = [await self._requests.get()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(batch[0].arrived + self.max_wait):  # the event loop's clock is time.monotonic
                while len(batch) < min(self.max_batch, self._expected):
                    batch.append(await self._requests.get())
        while len(batch) < self.max_batch and self.waiting():
            batch.append(self._requests.get_nowait())
        return batch

    def _compute(self, batch: Sequence[_Waiting]) -> list[np.ndarray | RequestError]:
        """One batch; if it fails, its rows one by one, so that only the one at fault is refused. After a fault of the GPU nothing works: raised."""
        try:
            return list(answered(self.policy, [request.observation for request in batch]))
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                raise
            if len(batch) > 1:
                return [result for request in batch for result in self._compute([request])]
            if isinstance(error, (ConfigError, PolicyError)):
                return [RequestError(str(error), status=400 if isinstance(error, InputError) else 500)]
            logging.getLogger("serve").exception("the policy failed")
            return [RequestError(f"the policy failed on this request ({type(error).__name__})", status=500)]
