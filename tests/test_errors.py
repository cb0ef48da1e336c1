"""How a script ends when nobody reads its output any more; the other endings stand in test_signals.py."""

import os
import signal
import subprocess
import sys

import pytest

from prismatic.errors import exit_codes
from tests.conftest import REPOSITORY

SCRIPT = "import sys\nfrom prismatic.errors import ConfigError, exit_codes\nwith exit_codes():\n    "


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("print('x', flush=True)", 1, []),
        ("print('x'); sys.exit(0)", 0, []),  # as a flag library leaves after --help, with all still in the buffer
        ("print('x'); raise ConfigError('no such file')", 2, ["error: no such file"]),
    ],
)
def test_a_reader_that_has_gone_is_no_traceback(body: str, code: int, says: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", SCRIPT + body]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr.splitlines()) == (code, says)


def test_another_pipes_end_keeps_its_traceback() -> None:
    command = [sys.executable, "-c", SCRIPT + "raise BrokenPipeError('of a worker')"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("BrokenPipeError: of a worker\n")


@pytest.mark.parametrize(
    "said",
    [
        "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total capacity of …",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported …",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_a_gpu_without_memory_is_a_sentence_with_the_flags(
    said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as error, exit_codes():
        raise RuntimeError(said)
    told = capsys.readouterr().err
    assert error.value.code == 2 and "--batch_size" in told and "GPU 0" not in told and told.count("\n") == 1
    with pytest.raises(RuntimeError, match="cc1plus"), exit_codes():
        raise RuntimeError(
            "g++ -DUSE_CUDA -I/opt/CUDA/include " + "-Wall " * 20 + "cc1plus: out of memory allocating 65536 bytes"
        )
