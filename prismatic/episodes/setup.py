"""What stands before an evaluation's first episode: the policy loaded onto this rank's device, the run's name, what its numbers depend on."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prismatic import machine
from prismatic.errors import ConfigError
from prismatic.evaluation import Facts, Loaded
from prismatic.filenames import STEP_FOLDER
from prismatic.hub import newest_step
from prismatic.ranges import check_folder_name
from prismatic.versions import folder_fingerprint

ACTION_DIM = 7  # numbers of LIBERO's actions
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))  # set by torchrun
LOCAL_RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, which they share
GATHERING = (
    0.03  # s for which a GPU's answer waits for other simulators to ask: a batch costs it little more than a row
)


def load_policy(checkpoint: str, *, seed: int, to_act: bool = True, **options: Any) -> Loaded:
    """A policy on this rank's GPU, or on one thread of the CPU. options: checkpoint.load_policy's.

    to_act: in LIBERO; ConfigError for a policy that gives another number of numbers than it takes.
    """
    import torch

    from prismatic import checkpoint as checkpoints

    torch.manual_seed(seed)
    device = None
    if torch.cuda.is_available():
        device = f"cuda:{LOCAL_RANK}"
        torch.cuda.set_device(device)  # else every rank would also keep a context on the first GPU
    elif "OMP_NUM_THREADS" not in os.environ:
        # The simulators fill the cores, and a number that followed theirs would change the last digits of actions.
        torch.set_num_threads(1)
    policy = checkpoints.load_policy(checkpoint, device=device, **options)
    if to_act and policy.processor.action_dim != ACTION_DIM:
        raise ConfigError(
            f"{checkpoint} answers with {policy.processor.action_dim} numbers and LIBERO takes {ACTION_DIM}: "
            "--open_loop True compares it with recorded actions instead"
        )
    return Loaded(
        policy, prepare=policy.processor.image_path, counts=policy.counts, window=GATHERING if device else 0.0
    )


def workers_that_fit() -> int:
    """Simulator processes of this rank; where a GPU computes, its memory that is left counts too, and a core stays for this process."""
    import sys

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return machine.simulators_that_fit(LOCAL_RANKS)
    free, _ = torch.cuda.mem_get_info()
    return machine.simulators_that_fit(LOCAL_RANKS, spare_cores=1, gpu_memory=free)


def run_name(suite: str, actor: str, *, instruction: str = "keep", note: str | None = None) -> str:
    """OpenVLA's EVAL-{suite}-{…}--{note}, with the policy's name and without the date, so that a run can be continued."""
    name = f"EVAL-{suite}-{actor}"
    name += "" if instruction == "keep" else f"--instruction-{instruction}"
    name += f"--{note}" if note else ""
    return check_folder_name(re.sub(r"[^\w.+=-]", "_", name), "--run_id_note")


def checkpoint_name(checkpoint: str | Path, precision: tuple[str, str | None]) -> str:
    """What a run calls its checkpoint: a step folder by its run's name too; precision and backend where they are not the default."""
    folder = newest_step(Path(checkpoint)).resolve()
    name = f"{folder.parent.name}-{folder.name}" if STEP_FOLDER.fullmatch(folder.name) else folder.name
    return name + "".join(f"-{part}" for part in precision if part and part != "none")


def weights(checkpoint: str | Path | None) -> str | None:
    """A folder by its content, as one that is trained anew is another policy; a hub id by its name."""
    if checkpoint and Path(checkpoint).exists():
        folder = newest_step(Path(checkpoint))
        return f"{folder.resolve().name}, fingerprint {folder_fingerprint(folder)}"
    return str(checkpoint) if checkpoint else None


def changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Facts:
    """Of these, what is not at its default: named only then, so that runs of before it was there go on."""
    return {name: value for name, value in values.items() if value != defaults[name]}
