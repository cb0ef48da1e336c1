"""What ends a run: each signal is noted once, ends a wait for data, and leaves a lost terminal alone."""

import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from typing_extensions import Buffer

from prismatic.errors import Terminated, exit_codes
from prismatic.training.signals import STOPPING, StopSignal, leave
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOPPING}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests too may have been started with nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_ends_a_wait_and_a_second_one_the_run(number: signal.Signals) -> None:
    stop = StopSignal()
    assert stop.unless_stopped(lambda: 3) == 3 and stop.agreed() is None

    def wait() -> int:
        os.kill(os.getpid(), number)
        time.sleep(30)
        return 3

    began = time.monotonic()
    assert stop.unless_stopped(wait) is None and time.monotonic() - began < 10
    assert stop.agreed() == number and stop.unless_stopped(lambda: 3) is None
    ending, name = (KeyboardInterrupt, None) if number == signal.SIGINT else (Terminated, number.name)
    with pytest.raises(ending, match=name):
        os.kill(os.getpid(), number)
        time.sleep(1)
    with pytest.raises(ending, match=name):
        leave(number)


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143), ("SIGUSR1", 143)])
def test_the_last_line_names_what_ended_the_run(number: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_codes():
        if number == "SIGTERM":  # also where nobody listens but exit_codes
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        leave(signal.Signals[number])
    last = "Ctrl-C" if number == "SIGINT" else number
    assert caught.value.code == code and capsys.readouterr().err == f"stopped by {last}\n"


def test_a_signal_during_a_step_interrupts_nothing_and_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.01)
    assert stop.received == signal.SIGUSR1


class _Interrupted(io.RawIOBase):
    """A stdout in whose midst a signal comes."""

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        if not self.closed and bytes(data).startswith(b"step"):
            os.kill(os.getpid(), signal.SIGTERM)
        return len(bytes(data))


def test_a_signal_in_the_midst_of_a_print_is_noted_and_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = StopSignal()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(_Interrupted()), line_buffering=True))
    print("step 1")  # a second print within it is a RuntimeError
    assert stop.received == signal.SIGTERM and "saving after this step" in capfd.readouterr().out


def test_a_signal_is_noted_though_nobody_reads_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    broken, closed = os.fdopen(writer, "w"), io.StringIO()
    closed.close()
    for stdout in (broken, closed, None):
        stop = StopSignal()
        monkeypatch.setattr(sys, "stdout", stdout)
        assert stop.unless_stopped(lambda: os.kill(os.getpid(), signal.SIGTERM)) is None
        assert stop.received == signal.SIGTERM
    with pytest.raises(BrokenPipeError):
        broken.close()


HUNG_UP = """
import os, signal, sys, time
from prismatic.training.signals import StopSignal
stop = StopSignal()
print("ready", flush=True)
while stop.received is None: time.sleep(0.01)
time.sleep(0.2)
print("written to a terminal that is gone", flush=True)
open(sys.argv[1], "w").write("saved")
"""


def test_a_terminal_that_is_gone_does_not_end_the_saving(tmp_path) -> None:
    ours, theirs = pty.openpty()
    how = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "cwd": REPOSITORY, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", HUNG_UP, str(tmp_path / "saved")], **how)
    os.close(theirs)
    printed = b""
    # a terminal passes a line's end on by itself: were it gone before that, "ready" itself would fail
    while not printed.endswith(b"\n"):
        printed += os.read(ours, 100)
    assert printed.startswith(b"ready")
    os.close(ours)  # the terminal goes away
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0 and (tmp_path / "saved").read_text() == "saved"
