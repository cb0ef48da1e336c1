"""What this process may use of the machine: cores, memory, GPU. A container's limits count, not the host's size."""

import os
import subprocess
from pathlib import Path

import psutil

from prismatic.errors import ConfigError

CGROUP = Path("/sys/fs/cgroup")
GPU_RENDERER_BYTES = 300_000_000  # of the GPU's memory, a renderer's context and buffers; not measured here
NEWER_DRIVER = "take a newer driver, or torch and torchvision of a cu12x index: the README's pitfalls have the command"
RENDERER_BYTES = 2_000_000_000  # one LIBERO process with a renderer holds 1.4 to 1.7 GB and does not grow


def available_cores() -> int:
    """Cores this process may keep busy: its affinity mask, and the container's quota where there is one."""
    cores = len(os.sched_getaffinity(0))
    quota, period = [*_read(CGROUP / "cpu.max").split(), "", ""][:2]
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def uses_gpu() -> bool:
    """Whether torch computes on a GPU. ConfigError where one is here and torch can't use it: the CPU would take its place without a word."""
    import torch

    if torch.cuda.is_available():
        return True
    if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and (found := gpus()):
        why = "this torch is a CPU's: take torch and torchvision for CUDA"
        if cuda := torch.version.cuda:
            why = f"torch, made for CUDA {cuda}, can't use it with driver {found[0]['driver']}: {NEWER_DRIVER}"
        hide = "CUDA_VISIBLE_DEVICES= in front of the command computes on the CPU"
        raise ConfigError(f"{found[0]['name']} is here, and {why}. {hide}")
    return False


def expandable_segments() -> None:
    """Let torch's allocator grow its blocks, before the first is taken: rows differ in length, and less lies in fragments then."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def own_gpu(rank: int) -> str:
    """The device of this machine's process `rank`. ConfigError where there are fewer GPUs."""
    import torch

    if rank >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"process {rank} of this machine has no GPU, there are {count}: give torchrun --nproc-per-node that number"
        )
    return f"cuda:{rank}"


def available_memory() -> int:
    """Bytes that can still be taken before swapping or being killed."""
    free = psutil.virtual_memory().available
    limit, used = _read(CGROUP / "memory.max").strip(), _read(CGROUP / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        cached = dict(line.split() for line in _read(CGROUP / "memory.stat").splitlines())
        free = min(free, int(limit) - int(used) + int(cached.get("inactive_file", 0)))
    return max(free, 0)


def resident(pid: int | None = None) -> int:
    """Bytes of a process (None: this one) that can't be dropped again, as pages of mapped files can; 0 if it is gone."""
    try:
        held = psutil.Process(pid).memory_info()
    except psutil.NoSuchProcess:
        return 0
    return held.rss - held.shared


def resident_with_children() -> int:
    """The same of this process and of those that it started itself, such as a data loader's workers."""
    return resident() + sum(resident(child.pid) for child in psutil.Process().children())


def simulators_that_fit(shares: int = 1, *, spare_cores: int = 0) -> int:
    """How many simulator processes run at once: one a core, as far as the memory goes; at least 1.

    shares: processes that divide this machine among them, such as torchrun's ranks on it; the answer is for one of them. spare_cores: of
    that one's cores, those to be left alone.
    """
    return max(1, min(available_cores() // shares - spare_cores, available_memory() // shares // RENDERER_BYTES))


def peak_memory() -> int:
    """Most bytes this process has held in memory at once, shared libraries included.

    Not getrusage's: in a spawned process that begins with what its parent held.
    """
    status = dict(line.split(":", 1) for line in _read(Path("/proc/self/status")).splitlines())
    return int(status.get("VmHWM", "0").split()[0]) * 1024


def gpus() -> list[dict[str, str]]:
    """Name and driver of each NVIDIA GPU, asked of the driver's own tool so that torch need not be imported."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in answer.splitlines() if ", " in line]
    return [{"name": row[0], "driver": row[-1]} for row in rows]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
