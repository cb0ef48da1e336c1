"""What this process may use of the machine: cores, memory, GPU. A container's limits count, not the host's
size.
"""

import os
import subprocess
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
RENDERER_BYTES = 2_000_000_000  # one LIBERO process with a renderer holds 1.6 to 1.9 GB and does not grow


def available_cores() -> int:
    """Cores this process may keep busy: its affinity mask, and the container's quota where there is one."""
    cores = len(os.sched_getaffinity(0))
    quota, period = [*_read(CGROUP / "cpu.max").split(), "", ""][:2]
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def available_memory() -> int:
    """Bytes that can still be taken before swapping or being killed."""
    lines = dict(line.split(":", 1) for line in _read(MEMINFO).splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _read(CGROUP / "memory.max").strip(), _read(CGROUP / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        cached = dict(line.split() for line in _read(CGROUP / "memory.stat").splitlines())
        free = min(free, int(limit) - int(used) + int(cached.get("inactive_file", 0)))
    return max(free, 0)


def simulators_that_fit() -> int:
    """How many simulator processes this machine runs at once: one a core, as far as the memory goes; at least
    1.
    """
    return max(1, min(available_cores(), available_memory() // RENDERER_BYTES))


def peak_memory() -> int:
    """Most bytes this process has held in memory at once, shared libraries included.

    Not getrusage's: in a spawned process that begins with what its parent held.
    """
    lines = dict(line.split(":", 1) for line in _read(STATUS).splitlines() if ":" in line)
    return int(lines.get("VmHWM", "0 kB").split()[0]) * 1024


def gpus() -> list[dict[str, str]]:
    """Name and driver of each NVIDIA GPU, asked of the driver's own tool so that torch need not be imported;
    [] if none.
    """
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
