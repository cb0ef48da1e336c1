"""What the benches measure with: calls that take turns, the machine's own rates, models of random weights."""

import gc
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prismatic.models import weights
from prismatic.models.nf4 import prepare_nf4
from prismatic.models.vla import VLA, VLAConfig

Row = dict[str, Any]  # of a table: column → value
GIB = 2**30
REPEATS = 5  # of what measures the machine
GPU_BYTES, CPU_BYTES = 2 * 10**9, 256 * 10**6  # of the tensor that is copied: beyond every cache
GPU_SIDE, CPU_SIDE = 8192, 1024  # of the square matrices


def digits(number: float) -> float:
    """Three significant digits."""
    return float(f"{number:.3g}")


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory() -> None:
    """Give back to the GPU what nobody holds any more, and begin its peak anew."""
    gc.collect()  # compiled layers go in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Seconds (rounds,) of each call. They take turns, so that whatever else the machine does falls on all of them."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            taken[name].append(time.perf_counter() - start)
    return {name: torch.tensor(times) for name, times in taken.items()}


def seconds_of(call: Callable[[], object], rounds: int, device: torch.device) -> torch.Tensor:
    """Seconds (rounds,) of one call, after two that make it warm."""
    return seconds_in_turns({"": call}, rounds + 2, device)[""][2:]


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy, read and written counted."""
    source = torch.ones(GPU_BYTES if device.type == "cuda" else CPU_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / float(seconds_of(lambda: target.copy_(source), REPEATS, device).min())


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a square matrix product."""
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / float(seconds_of(lambda: a @ b, REPEATS, device).min())


def random_model(config: VLAConfig, *, dtype: torch.dtype, device: torch.device, nf4: bool = False) -> VLA:
    """A model made on the device, tensor by tensor: N(0, 0.02²), biases too; norms and LayerScale 1. nf4: packed as by --use_quantization."""
    with torch.device("meta"):
        vla = VLA(config)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(name: str, shape: torch.Size) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if "norm" in name.split(".")[-2] or name.endswith("scale_factor"):
            return tensor.fill_(float(not name.endswith("bias")))
        return tensor.normal_(std=0.02, generator=generator)

    stored = {
        name: weights.StoredTensor(Path("random"), tuple(tensor.shape), partial(drawn, name, tensor.shape))
        for name, tensor in vla.state_dict().items()
    }
    if nf4:
        prepare_nf4(vla, on_cpu=device.type == "cpu")
    weights.fill(vla, stored, dtype=dtype, device=device)
    return vla
