"""What Ctrl-C, SIGTERM, SIGHUP (the connection is gone) and SIGUSR1 (Slurm: time is nearly up) do to a run: it saves and stops.

The first one is noted, and ends a wait for data; a second one ends the run at once. Surprising: after SIGHUP the terminal is gone, so
what is printed goes nowhere; and where SIGHUP was ignored from the start (nohup), it stays ignored.
"""

import contextlib
import os
import signal
import stat
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from prismatic.errors import STDOUT, Terminated
from prismatic.training.distributed import SINGLE_PROCESS, Ranks

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
T = TypeVar("T")


class _StopWaiting(BaseException):
    """A signal came while data was waited for."""


class StopSignal:
    """Listens from its making on. `received`: the first signal that came."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._waiting = False
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        if self.received is not None:
            leave(signal.Signals(number))
        self.received = signal.Signals(number)
        _say(f"\n{self.received.name}: saving after this step, then stopping (once more: stop at once)\n")
        if self._waiting:
            raise _StopWaiting

    def unless_stopped(self, wait: Callable[[], T]) -> T | None:
        """What `wait` returns; None if a signal has come or comes meanwhile."""
        try:
            try:
                self._waiting = True
                return wait() if self.received is None else None
            finally:
                self._waiting = False
        except _StopWaiting:
            return None

    def agreed(self, ranks: Ranks = SINGLE_PROCESS) -> signal.Signals | None:
        """The signal that any rank has received by now, the same answer on all."""
        shares = ranks.mean([self.received == number for number in STOPPING])
        return next((number for number, share in zip(STOPPING, shares, strict=True) if share), None)


def leave(number: signal.Signals) -> NoReturn:
    """End the process as `exit_codes` ends it for this signal."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number.name)


def _say(text: str) -> None:
    """Write to stdout from a signal's handler, whatever has become of it: the run is to be saved. Within another print Python refuses a second."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it (`… | tee log`, which Ctrl-C ends too)
        try:
            print(text, end="", flush=True)
        except RuntimeError:
            os.write(STDOUT, text.encode())


def _leave_terminal() -> None:
    """Send stdout and stderr nowhere if they go to a terminal: writing to one that is gone is an error."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None and stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
