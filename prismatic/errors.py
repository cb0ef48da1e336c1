"""Errors that a person can act on, and the exit codes of every script.

A wrong configuration, or a GPU without memory for it, is one sentence on stderr and exit 2; Ctrl-C is 130 and SIGTERM
(in training SIGHUP and SIGUSR1 too) 143, so that `finetune.py … && eval.py …` doesn't go on after a stop. Output that
nobody reads on (`… --help | head`) is 1, without a word. Anything else is a bug and keeps its traceback.
"""

import contextlib
import os
import re
import select
import signal
import sys
from collections.abc import Iterator

STDOUT = 1  # file descriptor
SMALLER = (
    "end what else runs there, or learn with --gradient_checkpointing True or half the --batch_size and twice the --grad_accumulation_steps "
    "(the same command goes on from the last saved step), or act with --quantize int8"
)


class ConfigError(Exception):
    """One sentence that names the file, field or flag and the way out."""


class PolicyError(Exception):
    """What a policy answered is no action, and would be again: its episode is an error, never a failure."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU had no memory left: said by torch's allocator, by the driver (AcceleratorError) or by cuBLAS."""
    return bool(re.search(r"OutOfMemoryError|\bCU(DA|BLAS|DNN)\b.{0,60}out of memory|ALLOC_FAILED", repr(error)))


class Terminated(BaseException):
    """A signal's name: it asks this process to end. Raised in the main thread, like KeyboardInterrupt, so that `finally` blocks save."""


def _raise_terminated(signum: int, frame: object) -> None:
    raise Terminated(signal.Signals(signum).name)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Run a script's body and leave with the codes above. Use: `with exit_codes(): main(...)`."""
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        said = re.split(r"\n|\. GPU ", str(error))[0]
        print(f"error: the GPU has no memory left ({said}): {SMALLER}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except Terminated as error:
        print(f"stopped by {error}", file=sys.stderr)
        sys.exit(143)
    except BrokenPipeError:
        if not _stdout_is_broken():
            raise
        sys.exit(1)
    finally:
        if _stdout_is_broken():  # so that what is still buffered goes nowhere, without a complaint as Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)


def _stdout_is_broken() -> bool:
    """Whether it is a pipe whose reader has gone."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    return bool(poll.poll(0))
