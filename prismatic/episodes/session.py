"""What one call of eval.py does with its policy, and measures of itself: answers in batches, latency, memory, the golden frame.

A run may be continued or shared by ranks: each call has its own entry in the protocol's `sessions`, none is averaged away.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from prismatic import machine
from prismatic.episodes.player import Outcome
from prismatic.episodes.result import Facts
from prismatic.errors import PolicyError
from prismatic.observation import Observation, answered
from prismatic.versions import git_commit

if TYPE_CHECKING:  # it needs torch, which an evaluation of the expert does not
    from prismatic.policy import Policy


class Session:
    """One call's policy and measurements. counts: of what decoding has done, where the policy keeps such (see models/decode.py).

    one_by_one: ask the policy row by row, so that not even rounding depends on who else waits.
    """

    def __init__(
        self,
        policy: "Policy | None" = None,
        *,
        workers: int,
        rank: int = 0,
        one_by_one: bool = False,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        self._policy, self._workers, self._rank, self._one_by_one = policy, workers, rank, one_by_one
        self._counts = counts or {}
        self._started, self._clock = datetime.now(UTC), time.monotonic()
        self.seconds: list[float] = []  # of each call of the policy
        self.rows = self.episodes = 0
        self._processes: dict[int, int] = {}  # process id → its peak, bytes
        self._device_bytes = 0
        self._golden: dict[str, Any] | None = None

    def answer(self, questions: Sequence[tuple[Any, Observation]]) -> list[Any]:
        """For each simulator process that waits, by its job: a chunk (K, 7) float32, or the PolicyError to be raised there."""
        assert self._policy is not None
        if self._one_by_one and len(questions) > 1:
            return [answer for question in questions for answer in self.answer([question])]
        rows = [dataclasses.replace(asked, stream=job) for job, asked in questions]
        start = time.perf_counter()
        try:
            chunks = answered(self._policy, rows)
        except PolicyError as error:
            if len(rows) == 1:
                return [error]
            return [answer for question in questions for answer in self.answer([question])]
        self.seconds.append(time.perf_counter() - start)
        self.rows += len(rows)
        return list(np.asarray(chunks, dtype=np.float32))

    def hear(self, kind: str, content: Any) -> None:
        """What a simulator process says unasked."""
        if kind == "golden":
            self._golden = content

    def note(self, outcome: Outcome) -> None:
        """An episode has ended."""
        self.episodes += 1
        if outcome.process:
            self._processes[outcome.process] = max(outcome.peak_memory, self._processes.get(outcome.process, 0))
        if cuda := cuda_in_use():
            free, total = cuda.mem_get_info()
            self._device_bytes = max(self._device_bytes, total - free)

    def record(self) -> Facts:
        """The entry: times in ms and s, memory in bytes; null where there was nothing to measure."""
        latency = decoding = gpu = None
        if calls := len(self.seconds):
            p50, p95 = np.percentile(1000 * np.array(self.seconds), [50, 95]).round(2).tolist()
            latency = {"p50": p50, "p95": p95, "calls": calls, "rows_per_call": round(self.rows / calls, 2)}
        if self._counts.get("calls"):  # forward passes of the language model a call; of drafting: accepted tokens a row
            decoding = {
                "passes_per_call": round(self._counts["passes"] / self._counts["calls"], 2),
                "accepted_tokens": round(self._counts.get("accepted", 0) / self._counts["actions"], 2),
            }
        # torch's own peaks, loading included, and the most that the whole device held (renderers too)
        if cuda := cuda_in_use():
            own = {"allocated": cuda.max_memory_allocated(), "reserved": cuda.max_memory_reserved()}
            gpu = {**own, "device": self._device_bytes}
        # each process's own peak; of replaced processes the largest, as no more than `workers` live at once
        parent, workers = machine.peak_memory(), sorted(self._processes.values(), reverse=True)[: self._workers]
        return {
            "started": self._started.isoformat(timespec="seconds"),
            "rank": self._rank,
            "git_commit": git_commit(),
            "workers": self._workers,
            "episodes": self.episodes,
            "seconds": round(time.monotonic() - self._clock, 1),
            "policy_latency_ms": latency,
            "decoding": decoding,
            "host_memory_peak_bytes": {"parent": parent, "workers": workers, "sum": parent + sum(workers)},
            "gpu_memory_peak_bytes": gpu,
            "golden_frame": self._golden,
        }


def cuda_in_use() -> Any:
    """torch.cuda, if something computes on a GPU here. torch is never imported for it: the expert needs none."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
