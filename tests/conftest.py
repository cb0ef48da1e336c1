"""Fixtures that several test files share."""

import os
from pathlib import Path

import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: expected numbers are a CPU's, also where there is a GPU

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
EXCERPT = Path(__file__).resolve().parent / "reference"
FULL = Path(os.environ.get("OPENVLA_REFERENCE", REPOSITORY / "../shared/reference"))
OFT_EXCERPT = Path(__file__).resolve().parent / "reference_oft"
OFT_FULL = Path(os.environ.get("OPENVLA_OFT_REFERENCE", REPOSITORY / "../shared/reference_oft"))

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


@pytest.fixture(scope="session", params=["excerpt", "full"])
def numbers(request: pytest.FixtureRequest) -> Path:
    """Each of: the excerpt of the original's arrays that lives in this repository, and the full set where it is there."""
    return EXCERPT if request.param == "excerpt" else request.getfixturevalue("reference")


@pytest.fixture(scope="session")
def oft_reference() -> Path:
    """The full set of OpenVLA-OFT's inputs and outputs, which belongs to the one above; tests that need it are skipped elsewhere."""
    if not OFT_FULL.is_dir():
        pytest.skip("set OPENVLA_OFT_REFERENCE to the folder of OpenVLA-OFT's reference arrays")
    return OFT_FULL.resolve()


@pytest.fixture(scope="session", params=["excerpt", "full"])
def both_numbers(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """OpenVLA's numbers and OpenVLA-OFT's: the excerpts of both, and both full sets where they are there."""
    if request.param == "excerpt":
        return EXCERPT, OFT_EXCERPT
    return request.getfixturevalue("reference"), request.getfixturevalue("oft_reference")


@pytest.fixture(scope="session")
def oft_numbers(both_numbers: tuple[Path, Path]) -> Path:
    """Each of: the excerpt of OpenVLA-OFT's arrays in this repository, and the full set."""
    return both_numbers[1]


@pytest.fixture(scope="session")
def batch(numbers: Path) -> dict[str, torch.Tensor]:
    """The right-padded batch of three of forward.npz, as VLA.forward takes it."""
    arrays = np.load(numbers / "forward.npz")
    names = ("input_ids", "attention_mask", "pixel_values", "labels")
    return {name: torch.from_numpy(arrays[name]) for name in names} | {
        "pixel_values": torch.from_numpy(arrays["pixel_values"]).float()
    }


SLOW = (  # files that start a simulator, a training run or child processes; the rest takes about two minutes on two cores
    "bench_data", "bench_eval", "bench_gpu", "bench_train", "collect", "demonstration", "distributed", "doctor", "end_to_end", "expert",
    "finetune", "golden", "infer", "own_data", "pool", "recorder", "replay", "resume", "rlds", "rlds_forms", "serve",
    "hostile_inputs", "loader", "serving_guard", "simulator", "training_model", "validation",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker(pytest.mark.slow)
