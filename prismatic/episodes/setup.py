"""What stands before an evaluation's first episode: its flags checked, the policy loaded, the run's name, what its numbers depend on."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prismatic import machine
from prismatic.episodes.result import Facts
from prismatic.episodes.session import cuda_in_use
from prismatic.errors import ConfigError
from prismatic.evaluation import Loaded
from prismatic.filenames import STEP_FOLDER
from prismatic.hub import newest_step
from prismatic.normalize import ACTION_DIMENSIONS
from prismatic.ranges import check_folder_name
from prismatic.scene.suites import Benchmark
from prismatic.versions import SIMULATOR_PACKAGES, folder_fingerprint, versions

ACTION_DIM = len(ACTION_DIMENSIONS)  # numbers of LIBERO's actions
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))  # set by torchrun
LOCAL_RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, which they share
GATHERING = 0.03  # s for which a GPU's answer waits for others to ask: a batch costs it little more than a row
# What the numbers depend on: always, of a checkpoint, and where it is not at its default.
IDENTITY = ("task_suite_name", "policy", "num_steps_wait", "env_seed", "seed", "render_quality")
OF_A_CHECKPOINT = ("unnorm_key", "center_crop", "load_in_8bit", "load_in_4bit", "deterministic")
SAID_OF_FOREIGN = ("action_head", "num_actions_chunk", "num_images_in_input")
QUANTISATION = 2  # is raised where the same flag makes other weights: 2 leaves the image towers whole, and INT4 is this project's own
WHERE_CHANGED = ("quantize", "instruction", "num_open_loop_steps", *SAID_OF_FOREIGN)
OF_A_REPLAY = ("gripper", "rotate_images")  # how its data set is read; --open_loop reads one too, but plays nothing


def check(values: Mapping[str, Any]) -> None:
    """What of eval.py's flags can't go together, before anything is loaded. ConfigError."""
    given = [name for name in ("load_in_8bit", "load_in_4bit") if values[name]]
    given += [f"quantize {values['quantize']}"] * (values["quantize"] != "none")
    policy, adapter = f"--policy {values['policy']}", values["lora_checkpoint"]
    asks, replays = values["policy"] == "checkpoint", values["policy"] == "replay"
    unset = "pretrained_checkpoint is not set: --pretrained_checkpoint FOLDER_OR_HUB_ID, or --policy expert"
    told = f"--instruction {values['instruction']}: only a checkpoint reads, {policy} doesn't"
    start = f"{policy} begins where each episode was recorded: leave out env_seed and first_init_state"
    for sentence, wrong in {
        unset: asks and not values["pretrained_checkpoint"],
        f"lora_checkpoint {adapter} is not a folder: --lora_checkpoint FOLDER": adapter and not adapter.is_dir(),
        f"{' and '.join(given)} exclude each other: set one of them": len(given) > 1,
        told: values["instruction"] != "keep" and not asks,
        f"--open_loop asks a checkpoint: leave out {policy}": values["open_loop"] and not asks,
        start: replays and (values["env_seed"] or values["first_init_state"]),
    }.items():
        if wrong:
            raise ConfigError(sentence)


def load_policy(values: Mapping[str, Any]) -> Loaded:
    """The policy that eval.py's flags name, on this rank's GPU, or on one thread of the CPU.

    ConfigError for one that is to act in LIBERO and gives another number of numbers than that takes.
    """
    import torch

    from prismatic import checkpoint as checkpoints
    from prismatic.models.compiled import memory_for

    torch.manual_seed(values["seed"])
    device = None
    if machine.uses_gpu():
        device = machine.own_gpu(LOCAL_RANK)
        torch.cuda.set_device(device)  # else every rank would also keep a context on the first GPU
    elif "OMP_NUM_THREADS" not in os.environ:
        # The simulators fill the cores, and a number that followed theirs would change the last digits of actions.
        torch.set_num_threads(1)
    name, (quantize, backend) = values["pretrained_checkpoint"], precision(values)
    policy = checkpoints.load_policy(
        name,
        adapter=values["lora_checkpoint"],
        quantize=quantize,
        device=device,
        backend=backend,
        drafting=None if values["drafting"] == "auto" else values["drafting"],
        **{flag: values[flag] for flag in ("unnorm_key", "center_crop", *SAID_OF_FOREIGN)},
    )
    if not values["open_loop"] and policy.processor.action_dim != ACTION_DIM:
        raise ConfigError(
            f"{name} answers with {policy.processor.action_dim} numbers and LIBERO takes {ACTION_DIM}: "
            "--open_loop True compares it with recorded actions instead"
        )
    return Loaded(
        policy,
        policy.processor.image_path,
        policy.counts,
        GATHERING if device else 0.0,
        lambda rows: memory_for(policy.vla, rows),
    )


def precision(values: Mapping[str, Any]) -> tuple[str, str | None]:
    """Precision and backend; None: the default one, or none is needed."""
    if values["load_in_8bit"] or values["load_in_4bit"]:
        return "int8" if values["load_in_8bit"] else "int4", "bitsandbytes"
    return values["quantize"], None


def workers_that_fit(memory_for: Callable[[int], int] | None) -> int:
    """Simulator processes of this rank. Where a GPU computes a core stays for this process, and each worker takes of the GPU's memory that is
    left: to draw with, where EGL draws, and to be answered (memory_for: bytes for so many at once; None: no model answers).
    """
    if memory_for is None or not (cuda := cuda_in_use()):
        return machine.simulators_that_fit(LOCAL_RANKS)
    free, _ = cuda.mem_get_info()
    drawing = machine.GPU_RENDERER_BYTES if os.environ.get("MUJOCO_GL") == "egl" else 0
    most = machine.simulators_that_fit(LOCAL_RANKS, spare_cores=1)
    return next((n for n in range(most, 1, -1) if n * drawing + memory_for(n) <= free), 1)


def run_name(values: Mapping[str, Any]) -> str:
    """OpenVLA's EVAL-{suite}-{…}--{note}, with the policy's name and without the date, so that a run can be continued.

    A step folder is called by its run's name too; precision and backend are named where they are not the default.
    """
    name = values["policy"] + (f"-{values['dataset_name']}" if values["policy"] == "replay" else "")
    if values["policy"] == "checkpoint":
        folder = newest_step(Path(values["lora_checkpoint"] or values["pretrained_checkpoint"])).resolve()
        name = f"{folder.parent.name}-{folder.name}" if STEP_FOLDER.fullmatch(folder.name) else folder.name
        name += "".join(f"-{part}" for part in precision(values) if part and part != "none")
    name = f"EVAL-{values['task_suite_name']}-{name}"
    name += "" if values["instruction"] == "keep" else f"--instruction-{values['instruction']}"
    name += f"--{values['run_id_note']}" if values["run_id_note"] else ""
    return check_folder_name(re.sub(r"[^\w.+=-]", "_", name), "--run_id_note")


def weights(checkpoint: str | Path | None) -> str | None:
    """A folder by its content, as one that is trained anew is another policy; a hub id by its name."""
    if checkpoint and Path(checkpoint).exists():
        folder = newest_step(Path(checkpoint))
        return f"{folder.resolve().name}, fingerprint {folder_fingerprint(folder)}"
    return str(checkpoint) if checkpoint else None


def identity(
    values: Mapping[str, Any], defaults: Mapping[str, Any], benchmark: Benchmark, *, renderer: str, dataset: str | None
) -> Facts:
    """What the numbers depend on, of all flags' values; weights by their content. dataset: fingerprint of what is replayed."""
    known, suite = versions(), values["task_suite_name"]
    facts: Facts = {name: values[name] for name in IDENTITY}
    if values["policy"] == "checkpoint":
        facts |= {name: weights(values[name]) for name in ("pretrained_checkpoint", "lora_checkpoint")}
        facts |= {name: values[name] for name in OF_A_CHECKPOINT}
        if values["quantize"] != "none" or values["load_in_4bit"]:
            facts["quantisation"] = QUANTISATION  # a folder of before is another policy's
    if values["policy"] == "replay":
        facts["dataset"] = f"{values['dataset_name']}, fingerprint {dataset}"
    changing = WHERE_CHANGED + OF_A_REPLAY * (values["policy"] == "replay")
    facts |= {name: values[name] for name in changing if values[name] != defaults[name]}
    facts |= {"step_limit": benchmark.step_limit(suite), "benchmark_files": benchmark.files_fingerprint(suite)}
    return facts | {"renderer": renderer} | {name: known[name] for name in SIMULATOR_PACKAGES}
