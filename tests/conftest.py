"""Fixtures that several test files share."""

import os
import signal
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: expected numbers are a CPU's, also where there is a GPU

import torch

# a shell has it ignored in what it starts with `&`, and children would not see Ctrl-C either
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]
EXCERPT = Path(__file__).resolve().parent / "reference"
FULL = Path(os.environ.get("OPENVLA_REFERENCE", REPOSITORY / "../shared/reference"))
OFT_EXCERPT = Path(__file__).resolve().parent / "reference_oft"
OFT_FULL = Path(os.environ.get("OPENVLA_OFT_REFERENCE", REPOSITORY / "../shared/reference_oft"))
# OpenVLA's arrays and OpenVLA-OFT's belong together: both full sets where they are there, else the excerpts.
SETS = (FULL.resolve(), OFT_FULL.resolve()) if FULL.is_dir() and OFT_FULL.is_dir() else (EXCERPT, OFT_EXCERPT)

torch.set_num_threads(1)  # the suite runs in parallel processes
# Autograd counts devices at its first use in a process. Fake CUDA tensors (the memory plan's) pretend that there is one, and after a first use
# with those a process can't be forked any more, as some tests do.
torch.zeros(1, requires_grad=True).sum().backward()


@pytest.fixture(scope="session")
def reference() -> Path:
    """The full set of inputs and outputs of the original OpenVLA code; tests that need it are skipped elsewhere."""
    if not FULL.is_dir():
        pytest.skip("set OPENVLA_REFERENCE to the folder of reference arrays")
    return FULL.resolve()


@pytest.fixture(scope="session")
def numbers() -> Path:
    """The original's arrays: the full set where it is there, else the excerpt that lies in this repository."""
    return FULL.resolve() if FULL.is_dir() else EXCERPT


@pytest.fixture(scope="session")
def oft_reference() -> Path:
    """The full set of OpenVLA-OFT's inputs and outputs, which belongs to the one above; tests that need it are skipped elsewhere."""
    if not OFT_FULL.is_dir():
        pytest.skip("set OPENVLA_OFT_REFERENCE to the folder of OpenVLA-OFT's reference arrays")
    return OFT_FULL.resolve()


@pytest.fixture(scope="session")
def both_numbers() -> tuple[Path, Path]:
    """OpenVLA's arrays and OpenVLA-OFT's."""
    return SETS


@pytest.fixture(scope="session")
def oft_numbers(both_numbers: tuple[Path, Path]) -> Path:
    """OpenVLA-OFT's arrays."""
    return both_numbers[1]


SLOW = (  # files that start a simulator, a training run or child processes; the rest takes about two minutes on two cores
    "bench_data", "bench_eval", "bench_gpu", "bench_train", "collect", "demonstration", "distributed", "doctor", "end_to_end", "expert",
    "finetune", "infer", "own_data", "pool", "recorder", "replay", "resume", "rlds", "rlds_forms", "serve",
    "hostile_inputs", "loader", "serving_guard", "simulator", "training_model", "validation",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker(pytest.mark.slow)
