"""The loader: a batch that doesn't come ends the run in a sentence, and the process ends too, though its worker is stuck."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from prismatic.data.loader import batches
from prismatic.errors import ConfigError
from tests.conftest import REPOSITORY

STUCK = """
import pathlib, sys, time

from prismatic.data import loader
from prismatic.errors import exit_codes


class Examples:  # the second batch takes an hour
    class processor:
        collate = staticmethod(list)

    def __init__(self, reached):
        self.reached = reached

    def __getitem__(self, index):
        if index:
            self.reached.touch()
            time.sleep(3600)
        return index


if __name__ == "__main__":
    loader.SLOWEST_BATCH = 15  # seconds: the first batch waits for a process to start
    with exit_codes():
        for batch in loader.batches(Examples(pathlib.Path(sys.argv[1])), [[0], [1]], num_workers=1, pin_memory=False):
            print("batch", batch, flush=True)
"""


HELD = """
from prismatic.data.loader import batches


class Examples:
    class processor:
        collate = staticmethod(list)

    def __getitem__(self, index):
        return index


if __name__ == "__main__":
    stream = batches(Examples(), [[0]] * 100, num_workers=1, pin_memory=False)
    held = [stream]
    held.append(held)  # nothing frees it before the process ends
    print(next(stream), flush=True)
"""


class Broken(Dataset):
    processor = types.SimpleNamespace(collate=list)

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __getitem__(self, index: int) -> int:
        raise self.error("frame 3 is damaged")


@pytest.mark.parametrize("error", [ConfigError, RuntimeError])
def test_a_workers_error_stays_what_it_is(error: type[Exception]) -> None:
    with pytest.raises(error, match="frame 3 is damaged") as told:
        next(batches(Broken(error), [[0]], num_workers=1, pin_memory=False))  # pyright: ignore[reportArgumentType]
    assert error is RuntimeError or str(told.value) == "frame 3 is damaged"


def test_a_stream_that_is_still_held_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    (tmp_path / "held.py").write_text(HELD)
    command, here = [sys.executable, str(tmp_path / "held.py")], {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0]\n", "")


def test_a_batch_that_never_comes_ends_the_process_in_a_sentence(tmp_path: Path) -> None:
    script, reached = tmp_path / "stuck.py", tmp_path / "reached"
    script.write_text(STUCK)
    command, here = [sys.executable, str(script), str(reached)], {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and reached.exists() and "batch [0]" in done.stdout
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "gave no batch" in sentence and "--num_workers 0" in sentence and "Traceback" not in done.stderr


def test_a_worker_that_imports_the_script_anew_imports_no_peft() -> None:
    """200 MB of each worker, and 2 of its 7 seconds."""
    command = [
        sys.executable,
        "-c",
        "import sys, finetune; print({'peft', 'bitsandbytes', 'tensorflow'} & {*sys.modules})",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
