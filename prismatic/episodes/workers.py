"""Simulator processes: trials in, outcomes out, in the order in which they end.

Each process (spawned) has one simulator and plays whole trials; it keeps the simulator while its task stays
the same. The policy answers all processes that wait as one batch. A process that dies, hangs or raises is
replaced and its trial played again; after three attempts the trial is an error.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from prismatic.episodes.player import Outcome, Setup, Trial, serve
from prismatic.errors import ConfigError

ATTEMPTS = 3  # the first and two repeats
SILENCE_LIMIT = 180.0  # s without a word from a process at play before it counts as hung; a step takes 0.1 s
NEAR_TIE = 1e-4  # difference of two logits that rounding can turn: a matrix product's last digits go by the batch size
START_LIMIT = 600.0  # s for starting and building a simulator (~10 s), which many processes do at once
ONE_THREAD = {
    "LP_NUM_THREADS": "0",
    "OMP_NUM_THREADS": "1",
}  # llvmpipe and BLAS, a process a core; the caller's own win
_context = multiprocessing.get_context("spawn")  # a forked child would inherit torch's and the renderer's threads


class _Worker:
    """The parent's side of one simulator process."""

    def __init__(self, setup: Setup) -> None:
        self.connection, theirs = _context.Pipe()
        self.process = _context.Process(target=serve, args=(theirs, setup), daemon=True)
        inherited = {name: os.environ.get(name) for name in ONE_THREAD}
        os.environ.update({name: value for name, value in ONE_THREAD.items() if inherited[name] is None})
        # Ctrl-C reaches every process of the terminal. The mask is inherited: the child never sees the signal,
        # the parent a moment later, so that the parent alone decides what stops.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for name in [name for name, value in inherited.items() if value is None]:
                del os.environ[name]
        theirs.close()
        self.trial: Trial | None = None
        self.scene: tuple[str, int, int] | None = None
        self.built = False
        self.observation: tuple[np.ndarray, str, np.ndarray | None] | None = None
        self.near_ties: list[int] = []  # steps of the trial at which the choice was that close
        self.answers = 0  # given in the trial
        self.started = self.heard = time.monotonic()

    def give(self, trial: Trial) -> None:
        self.built = self.built and self.scene == trial.scene
        self.trial, self.scene, self.observation = trial, trial.scene, None
        self.near_ties, self.answers = [], 0
        self.started = self.heard = time.monotonic()
        self.tell(trial)

    def tell(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it has died: its end of the pipe says so next
            self.connection.send(message)

    def stop(self) -> None:
        """Kill it: a simulator process has nothing to save, and a hung one would not listen."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class _Pool:
    def __init__(
        self,
        trials: Iterable[Trial],
        setup: Setup,
        policy: Any,
        num_workers: int,
        one_by_one: bool,
        silence_limit: float,
        on_golden: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.pending: dict[tuple[str, int, int], deque[Trial]] = {}
        for trial in trials:
            self.pending.setdefault(trial.scene, deque()).append(trial)
        self.setup, self.policy, self.num_workers = setup, policy, num_workers
        self.one_by_one, self.silence_limit, self.on_golden = one_by_one, silence_limit, on_golden
        self.workers: list[_Worker] = []
        self.attempts: Counter[Trial] = Counter()
        self.any_built = False

    def outcomes(self) -> Generator[Outcome, None, None]:
        try:
            while self.pending or any(worker.trial for worker in self.workers):
                self._assign()
                yield from self._listen()
                self._answer()
        finally:
            for worker in self.workers:
                worker.stop()

    def _next_trial(self, scene: tuple[str, int, int] | None) -> Trial:
        """One of the same scene if there is any, else of the scene with the most trials left per process on it."""
        if scene not in self.pending:
            busy = Counter(worker.scene for worker in self.workers if worker.trial)
            scene = max(self.pending, key=lambda scene: len(self.pending[scene]) / (1 + busy[scene]))
        trial = self.pending[scene].popleft()
        if not self.pending[scene]:
            del self.pending[scene]
        return trial

    def _assign(self) -> None:
        for worker in [worker for worker in self.workers if worker.trial is None]:
            if self.pending:
                worker.give(self._next_trial(worker.scene))
        while self.pending and len(self.workers) < self.num_workers:
            first = not self.attempts and not self.workers
            worker = _Worker(replace(self.setup, golden=first and self.on_golden is not None))
            self.workers.append(worker)
            worker.give(self._next_trial(None))

    def _listen(self) -> Iterator[Outcome]:
        """Hear whoever has something to say; wait only when nobody waits for an answer."""
        busy = {worker.connection: worker for worker in self.workers if worker.trial and worker.observation is None}
        answers_due = any(worker.observation is not None for worker in self.workers)
        deadlines = [worker.heard + self._limit(worker) for worker in busy.values()]
        patience = min(deadlines, default=0.0) - time.monotonic()
        for connection in wait(list(busy), timeout=0 if answers_due else max(patience, 0)):
            outcome = self._hear(busy.pop(connection))  # type: ignore[arg-type]
            if outcome:
                yield outcome
        for worker in busy.values():
            limit = self._limit(worker)
            if time.monotonic() - worker.heard > limit:
                outcome = self._give_up(worker, f"the simulator hung: no sign of life for {limit:g} s")
                if outcome:
                    yield outcome

    def _limit(self, worker: _Worker) -> float:
        return self.silence_limit if worker.built else START_LIMIT

    def _hear(self, worker: _Worker) -> Outcome | None:
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(timeout=5)
            return self._give_up(worker, f"the simulator process died ({_exit_reason(worker.process.exitcode)})")
        worker.heard = time.monotonic()
        if kind == "observation":
            worker.observation = content
        elif kind == "built":
            self.any_built = worker.built = True
        elif kind == "golden" and self.on_golden:
            self.on_golden(content)
        elif kind == "outcome":
            worker.trial = None
            return replace(content, facts=content.facts | {"near_ties": worker.near_ties})
        elif kind == "crashed":
            return self._give_up(worker, content)
        elif kind == "refused":
            raise ConfigError(content)
        return None

    def _give_up(self, worker: _Worker, reason: str) -> Outcome | None:
        """Replace the process and play its trial again, or record it as an error when it had its attempts."""
        trial, seconds = worker.trial, time.monotonic() - worker.started
        assert trial is not None
        worker.stop()
        self.workers.remove(worker)
        self.attempts[trial] += 1
        if self.attempts[trial] < ATTEMPTS:
            self.pending.setdefault(trial.scene, deque()).appendleft(trial)
            return None
        if not self.any_built:
            raise ConfigError(f"the simulator cannot be started, nothing was evaluated: {reason}")
        return Outcome(trial=trial, success=None, steps=0, seconds=seconds, error=reason)

    def _answer(self) -> None:
        waiting = [worker for worker in self.workers if worker.observation is not None]
        if not waiting:
            return
        actions, margins = self._act(waiting)
        for worker, action, margin in zip(waiting, actions, margins, strict=True):
            if margin < NEAR_TIE:
                worker.near_ties.append(worker.answers)
            worker.answers += 1
            worker.observation = None
            worker.heard = time.monotonic()
            worker.tell(action)

    def _act(self, waiting: Sequence[_Worker]) -> tuple[np.ndarray, np.ndarray]:
        """(B, 7) actions for the observations of B processes, and (B,) by how much they were chosen (inf from a policy that can't say)."""
        if self.one_by_one and len(waiting) > 1:
            actions, margins = zip(*(self._act([worker]) for worker in waiting), strict=True)
            return np.concatenate(actions), np.concatenate(margins)
        observations = [worker.observation for worker in waiting if worker.observation is not None]
        frames, instructions, wrists = (list(column) for column in zip(*observations, strict=True))
        names = {}
        if getattr(self.policy, "drafting", False):  # an attempt after a crash is another episode
            names["episodes"] = [(worker.trial, self.attempts[worker.trial]) for worker in waiting if worker.trial]
        wrists = wrists if self.setup.num_images > 1 else None
        actions = self.policy.batch(frames, instructions, wrists=wrists, **names)
        margins = getattr(self.policy, "last_margins", np.full(len(observations), np.inf))
        return np.asarray(actions, dtype=np.float32).reshape(len(observations), 7), margins


def _exit_reason(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def play(
    trials: Iterable[Trial],
    *,
    setup: Setup,
    policy: Any = None,
    num_workers: int = 1,
    one_by_one: bool = False,
    silence_limit: float = SILENCE_LIMIT,
    on_golden: Callable[[dict[str, Any]], None] | None = None,
) -> Generator[Outcome, None, None]:
    """Play the trials in `num_workers` processes and yield their outcomes in the order in which they end.

    policy: needed when setup.policy is "parent"; `policy.batch(frames, instructions, wrists=None) -> (B, 7)`.
    one_by_one: ask it row by row, so that not even rounding depends on who else waits (a matrix product
    changes in its last digits with the batch size). silence_limit: seconds after which a silent process counts
    as hung. on_golden: called once with golden.card() of the first process. ConfigError when a process refuses its configuration or
    none can ever be started. Closing the generator kills the processes.
    """
    return _Pool(trials, setup, policy, num_workers, one_by_one, silence_limit, on_golden).outcomes()
