"""What one call of eval.py measures of itself while it plays: the policy's latency, memory, and the golden frame.

A run may be continued or shared by ranks: each call has its own entry in the protocol's `sessions`, none is averaged away.
"""

import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from prismatic import machine
from prismatic.episodes.player import Outcome
from prismatic.versions import git_commit


class Meter:
    """Stands before the policy (its `batch`), and is told each outcome (`hear`) and the golden frame's card (`see`)."""

    def __init__(self, policy: Any, *, workers: int, rank: int = 0) -> None:
        self._policy, self._workers, self._rank = policy, workers, rank
        self._started, self._clock = datetime.now(UTC), time.monotonic()
        self._seconds: list[float] = []  # of each call of the policy
        self._rows = self.episodes = 0
        self._processes: dict[int, int] = {}  # process id → its peak, bytes
        self._device_bytes = 0
        self._golden: dict[str, Any] | None = None

    def batch(
        self,
        frames: Sequence[np.ndarray],
        instructions: Sequence[str],
        wrists: Sequence[np.ndarray] | None = None,
        **names: Any,
    ) -> np.ndarray:
        """The policy's own answer (B, 7), timed: it is on the host when it returns, so nothing is left to wait for."""
        start = time.perf_counter()
        actions = self._policy.batch(frames, instructions, wrists=wrists, **names)
        self._seconds.append(time.perf_counter() - start)
        self._rows += len(frames)
        return actions

    def __getattr__(self, name: str) -> Any:
        """Whatever else may be asked of a policy."""
        return getattr(self._policy, name)

    def see(self, card: dict[str, Any]) -> None:
        """card: golden.card() of a simulator process."""
        self._golden = card

    def hear(self, outcome: Outcome) -> None:
        """An episode has ended."""
        self.episodes += 1
        if outcome.process:
            self._processes[outcome.process] = max(outcome.peak_memory, self._processes.get(outcome.process, 0))
        if torch := self._cuda():
            free, total = torch.cuda.mem_get_info(self._policy.device)
            self._device_bytes = max(self._device_bytes, total - free)

    def session(self) -> dict[str, Any]:
        """The entry: times in ms and s, memory in bytes; null where there was nothing to measure."""
        return {
            "started": self._started.isoformat(timespec="seconds"),
            "rank": self._rank,
            "git_commit": git_commit(),
            "workers": self._workers,
            "episodes": self.episodes,
            "seconds": round(time.monotonic() - self._clock, 1),
            "policy_latency_ms": self._latency(),
            "decoding": self._decoding(),
            "host_memory_peak_bytes": self._host_memory(),
            "gpu_memory_peak_bytes": self._gpu_memory(),
            "golden_frame": self._golden,
        }

    def _latency(self) -> dict[str, float] | None:
        if not self._seconds:
            return None
        p50, p95 = np.percentile(1000 * np.array(self._seconds), [50, 95])
        calls = len(self._seconds)
        return {
            "p50": round(float(p50), 2),
            "p95": round(float(p95), 2),
            "calls": calls,
            "rows_per_call": round(self._rows / calls, 2),
        }

    def _decoding(self) -> dict[str, float] | None:
        """Passes through the language model a call; of drafting: leading words of the last answer that were right, a row, and rows decoded anew."""
        counts = getattr(self._policy, "counts", None)
        if not counts:
            return None
        rows = counts["actions"]
        return {
            "passes_per_call": round(counts["passes"] / counts["calls"], 2),
            "confirmed_words": round(counts["confirmed"] / rows, 2),
            "doubtful_rows": counts["doubtful"],
        }

    def _host_memory(self) -> dict[str, Any]:
        """Each process's own peak; of replaced processes the largest count, as no more than `workers` live at once."""
        parent, workers = machine.peak_memory(), sorted(self._processes.values(), reverse=True)[: self._workers]
        return {"parent": parent, "workers": workers, "sum": parent + sum(workers)}

    def _gpu_memory(self) -> dict[str, int] | None:
        """torch's own peaks, loading included, and the most that the whole device held when an episode ended (renderers too)."""
        torch = self._cuda()
        if torch is None:
            return None
        device = self._policy.device
        return {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
            "device": self._device_bytes,
        }

    def _cuda(self) -> Any:
        """torch, if the policy computes on a GPU. Never imported here: the expert needs none."""
        on_gpu = getattr(getattr(self._policy, "device", None), "type", "") == "cuda"
        return sys.modules["torch"] if on_gpu else None
