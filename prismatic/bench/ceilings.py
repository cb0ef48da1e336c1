"""What no decoder can beat: the weights of six one-word passes read at the machine's bandwidth, and the prompt's products at its matrix rate.

Both ceilings are measured here, on the device and in the number format at hand. Drafting is not bound by this floor: it reads the weights
less often.
"""

import gc
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from prismatic.models.decode import ActionDecoder
from prismatic.models.quantize import stored_bytes
from prismatic.models.vla import VLA, VLAConfig

REPEATS = 5
GPU_BYTES, CPU_BYTES = 2 * 10**9, 256 * 10**6  # of the tensor that is copied: beyond every cache
GPU_SIDE, CPU_SIDE = 8192, 1024  # of the square matrices


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory() -> None:
    """What nobody holds any more, back to the GPU."""
    gc.collect()  # compiled layers go in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shortest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few calls."""
    times = []
    for _ in range(REPEATS + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy, read and written counted."""
    source = torch.ones(GPU_BYTES if device.type == "cuda" else CPU_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / shortest(lambda: target.copy_(source), device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a square matrix product."""
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / shortest(lambda: a @ b, device)


def prompt_flop(config: VLAConfig, words: int) -> int:
    """FLOP of one row's first pass: towers, projector, language model, action rows of the head. Counted without computing it."""
    channels = 6 * config.num_images_in_input
    with torch.device("meta"), torch.inference_mode():
        vla = VLA(config).eval()
        pixels = torch.empty(1, channels, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter:
            ActionDecoder(vla)(torch.empty(1, words, dtype=torch.int64), pixels, 1)
    return counter.get_total_flops()


def step_bytes(vla: VLA) -> int:
    """Bytes of the weights that a one-word pass reads; the action rows of the head and one row of the table are small beside them."""
    return stored_bytes(vla.language_model.model.layers) + stored_bytes(vla.language_model.model.norm)
