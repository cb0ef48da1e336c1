"""What a person may change. Every field is also a flag of its script: `--help` shows the comment beside the field."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class EvalConfig:
    # Checkpoint folder, adapter folder (it knows its base) or hub id such as openvla/openvla-7b-finetuned-libero-spatial.
    pretrained_checkpoint: str = ""
    # Adapter folder that goes on top of the checkpoint.
    lora_checkpoint: Path | None = None
    # Who acts: the checkpoint; or, to check the set-up, the scripted expert, random actions, or none at all (zero).
    policy: Literal["checkpoint", "expert", "random", "zero"] = "checkpoint"
    # libero_spatial, libero_object, libero_goal, libero_10, libero_90, or a LIBERO-PRO suite such as libero_spatial_swap.
    task_suite_name: str = "libero_spatial"
    # Tasks of the suite, such as `--task_ids 0 3`; none means all.
    task_ids: tuple[int, ...] = ()
    # Stored initial states per task (LIBERO has 50).
    num_trials_per_task: int = 50
    # The first of them.
    first_init_state: int = 0
    # Steps of holding still before the policy acts; they do not count.
    num_steps_wait: int = 10
    # LIBERO's seed; it moves fixtures even with a stored initial state. Published numbers use 0.
    env_seed: int = 0
    # Seed of the random policy, and of sampling where a policy samples.
    seed: int = 7
    # Key of the data set's statistics. Only for a folder without processor.json that has several.
    unnorm_key: str | None = None
    # Whether it was trained with random crops. None: what the folder says, True where it says nothing.
    center_crop: bool | None = None
    # Weights in 8 bits.
    load_in_8bit: bool = False
    # Weights in 4 bits.
    load_in_4bit: bool = False
    # Simulator processes. auto: one a core, as far as the memory goes (2 GB each).
    num_workers: Annotated[int | Literal["auto"], tyro.conf.arg(aliases=("--workers",))] = "auto"
    # Ask the policy for one row at a time, so that not even rounding depends on the number of workers; slower.
    deterministic: bool = False
    # standard: LIBERO's pixels. fast: three times faster on a CPU, pixels differ by about 1.5 of 255; not for scores.
    render_quality: Literal["standard", "fast"] = "standard"
    # An mp4 of every episode.
    save_videos: bool = True
    # Play again the episodes that ended as errors in an earlier call.
    retry_errors: bool = False
    # Folder of rollout folders.
    local_log_dir: Path = Path("rollouts")
    # Is added to the rollout folder's name.
    run_id_note: str | None = None
    # Accepted because OpenVLA's command lines have it.
    model_family: Literal["openvla"] = "openvla"
