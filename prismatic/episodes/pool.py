"""Simulator processes, for evaluation, collection and replay: jobs in, results out, in the order in which they end.

Each process (spawned) has one simulator and does whole jobs; it keeps the simulator while the job's scene stays the same. What the
processes ask (for actions) is answered in batches by the parent. A process that dies, hangs or raises is replaced and its job done
again; after three attempts the job has failed.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import time
import unittest.mock
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from prismatic.errors import ConfigError

ATTEMPTS = 3  # the first and two repeats
HANG_LIMIT = 180.0  # s without a word from a process at play before it counts as hung; a step takes 0.1 s
START_LIMIT = 600.0  # s for starting and building a simulator (~10 s), which many processes do at once
HEARTBEAT = 1.0  # s between signs of life of a process that needs no answers
PR_SET_PDEATHSIG = 1  # Linux prctl: be sent a signal when the parent dies
# llvmpipe and BLAS, a process a core; the caller's own win
ONE_THREAD = {"LP_NUM_THREADS": "0", "OMP_NUM_THREADS": "1"}
GONE = (EOFError, BrokenPipeError, ConnectionResetError)  # of a pipe's other end
_context = multiprocessing.get_context("spawn")  # a forked child would inherit torch's and the renderer's threads


class Work(Protocol):
    """What a process does with its jobs; pickled once a process. `play` raises to have the job done again elsewhere."""

    def start(self, parent: "Parent", *, first: bool) -> None: ...
    def build(self, scene: Any) -> Any: ...
    def play(self, sim: Any, job: Any, parent: "Parent") -> Any: ...


@dataclass(frozen=True)
class Ended:
    """A job's end: its result, or the error of its last attempt."""

    job: Any
    result: Any
    error: str | None
    seconds: float


# --- in a simulator process -----------------------------------------------------------------------------------------


class Parent:
    """A simulator process's side of the pipe. waited: s spent on answers, of the present job."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._spoke, self.waited = connection, time.monotonic(), 0.0

    def send(self, kind: str, content: Any = None) -> None:
        """Say something that needs no answer."""
        self._connection.send((kind, content))
        self._spoke = time.monotonic()

    def ask(self, content: Any) -> Any:
        """Wait for the parent's answer."""
        self.send("question", content)
        answer = self._connection.recv()
        self.waited += time.monotonic() - self._spoke
        return answer

    def alive(self) -> None:
        """Call at each step: the parent hears of it now and then."""
        if time.monotonic() - self._spoke > HEARTBEAT:
            self.send("alive")


def serve(connection: Connection, work: Work, first: bool, parent_id: int) -> None:
    """A simulator process: does the jobs that it is sent, until the parent is gone or something breaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # writing a video unblocks what the parent has blocked for us
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_id:  # it died before the signal was asked for
        return
    parent, sim, scene = Parent(connection), None, None
    with contextlib.suppress(*GONE):
        try:
            work.start(parent, first=first)
            while True:
                job = connection.recv()
                parent.waited = 0.0
                if sim is None or scene != job.scene:
                    if sim is not None:
                        sim.close()
                    sim, scene = work.build(job.scene), job.scene
                    parent.send("built")
                parent.send("result", work.play(sim, job, parent))
        except GONE:
            raise
        except ConfigError as error:
            parent.send("refused", str(error))
        except Exception as error:
            parent.send("crashed", f"{type(error).__name__}: {error}")


# --- in the parent --------------------------------------------------------------------------------------------------


class _Worker:
    """The parent's side of one simulator process."""

    def __init__(self, work: Work, *, first: bool) -> None:
        self.connection, theirs = _context.Pipe()
        self.process = _context.Process(target=serve, args=(theirs, work, first, os.getpid()), daemon=True)
        # Ctrl-C reaches every process of the terminal. The mask is inherited: the child never sees the signal,
        # the parent a moment later, so that the parent alone decides what stops.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with unittest.mock.patch.dict(os.environ, {**ONE_THREAD, **os.environ}):
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self.job: Any = None
        self.scene: Hashable = None
        self.built = False
        self.question: Any = None
        self.asked: float | None = None  # when; None: it waits for no answer
        self.started = self.heard = time.monotonic()

    def give(self, job: Any) -> None:
        self.built = self.built and self.scene == job.scene
        self.job, self.scene, self.asked = job, job.scene, None
        self.started = self.heard = time.monotonic()
        self.send(job)

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it has died: its end of the pipe says so next
            self.connection.send(message)

    def stop(self) -> None:
        """Kill it: a simulator process has nothing to save, and a hung one would not listen."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def answer_at(asked: Sequence[float], *, playing: int, window: float, free: float = 0.0) -> float:
    """When those who asked at these times are answered: at once if no other of the `playing` can join them, else after the window.

    The window (s) begins with the first who asked, or when the last answer had been given (free): those who got it ask again soon.
    Answering whoever waits alternates two groups of simulators; a batch costs a GPU little more than a single row.
    """
    return max(min(asked), free) + (window if len(asked) < playing else 0.0)


@dataclass
class Pool:
    """Jobs, done in `num_workers` processes.

    next_job: told the scene for which a process has a simulator, gives it a job (hashable, with a `scene`); None: nothing now, perhaps more when
    a running job has ended. answer: gives one answer a question, (job, what its process asks).
    """

    next_job: Callable[[Hashable], Any]
    work: Work
    num_workers: int = 1
    answer: Callable[[Sequence[tuple[Any, Any]]], Sequence[Any]] | None = None
    window: float = 0.0  # s for which an answer waits for others to ask, see answer_at
    hang_limit: float = HANG_LIMIT  # s after which a silent process counts as hung
    on_message: Callable[[str, Any], None] = lambda kind, content: None  # what a process says unasked
    again: deque[Any] = field(default_factory=deque, init=False)  # jobs of processes that broke
    workers: list[_Worker] = field(default_factory=list, init=False)
    attempts: Counter[Any] = field(default_factory=Counter, init=False)
    any_started: bool = field(default=False, init=False)
    any_built: bool = field(default=False, init=False)
    free: float = field(default=0.0, init=False)  # when the last answer had been given

    def run(self) -> Generator[Ended, None, None]:
        """Yield the jobs' ends, in the order in which they end; closing the generator kills the processes.

        ConfigError when a process refuses its configuration or none can ever be started.
        """
        try:
            while self._assign():
                yield from self._listen()
                self._answer()
        finally:
            for worker in self.workers:
                worker.stop()

    def _next(self, scene: Hashable) -> Any:
        return self.again.popleft() if self.again else self.next_job(scene)

    def _assign(self) -> bool:
        """Give a job to whoever is idle, start processes while there are jobs for them; False when nothing is left to do."""
        for worker in [worker for worker in self.workers if worker.job is None]:
            if job := self._next(worker.scene):
                worker.give(job)
        while len(self.workers) < self.num_workers and (job := self._next(None)):
            worker = _Worker(self.work, first=not self.any_started)
            self.any_started = True
            self.workers.append(worker)
            worker.give(job)
        return any(worker.job for worker in self.workers)

    def _listen(self) -> Iterator[Ended]:
        """Hear whoever has something to say, until an answer is due."""
        busy: dict[Any, _Worker] = {w.connection: w for w in self.workers if w.job and w.asked is None}
        silent_until = {w: w.heard + (self.hang_limit if w.built else START_LIMIT) for w in busy.values()}
        deadline = min([*silent_until.values(), self._answer_at()])
        for connection in wait(list(busy), timeout=max(deadline - time.monotonic(), 0)):
            yield from self._hear(busy.pop(connection))
        for worker in busy.values():
            if time.monotonic() > silent_until[worker]:
                limit = silent_until[worker] - worker.heard
                yield from self._replace(worker, f"the simulator hung: no sign of life for {limit:g} s")

    def _answer_at(self) -> float:
        """When an answer is due: never where nobody waits for one."""
        asked = [worker.asked for worker in self.workers if worker.asked is not None]
        playing = sum(worker.built and worker.job is not None for worker in self.workers)
        return answer_at(asked, playing=playing, window=self.window, free=self.free) if asked else math.inf

    def _hear(self, worker: _Worker) -> Iterator[Ended]:
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(timeout=5)
            code = worker.process.exitcode
            how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
            yield from self._replace(worker, f"the simulator process died ({how})")
            return
        worker.heard = time.monotonic()
        if kind == "question":
            worker.question, worker.asked = content, worker.heard
        elif kind == "built":
            self.any_built = worker.built = True
        elif kind == "result":
            job, worker.job = worker.job, None
            yield Ended(job, content, None, worker.heard - worker.started)
        elif kind == "crashed":
            yield from self._replace(worker, content)
        elif kind == "refused":
            raise ConfigError(content)
        elif kind != "alive":
            self.on_message(kind, content)

    def _replace(self, worker: _Worker, reason: str) -> Iterator[Ended]:
        """End the process; its job is done again, or has failed when it had its attempts."""
        job, seconds = worker.job, time.monotonic() - worker.started
        worker.stop()
        self.workers.remove(worker)
        self.attempts[job] += 1
        if self.attempts[job] < ATTEMPTS:
            self.again.append(job)
        elif not self.any_built:
            raise ConfigError(f"the simulator cannot be started, nothing was played: {reason}")
        else:
            yield Ended(job, None, reason, seconds)

    def _answer(self) -> None:
        if self.answer is None or time.monotonic() < self._answer_at():
            return
        waiting = [worker for worker in self.workers if worker.asked is not None]
        answers = self.answer([(worker.job, worker.question) for worker in waiting])
        for worker, answer in zip(waiting, answers, strict=True):
            worker.asked, worker.heard = None, time.monotonic()
            worker.send(answer)
        self.free = time.monotonic()
