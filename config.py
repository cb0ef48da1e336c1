"""What a person may change. Every field is also a flag of its script: `--help` shows the comment beside the field.

Most people change WORKSPACE and nothing else: data sets, runs and caches live below it.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from prismatic.image import AUGMENTATIONS
from prismatic.ranges import BatchSize, FolderName, Seed, Share

GripperConvention = Literal["auto", "minus_one_open", "plus_one_open", "one_open", "zero_open", "none"]

# Where data sets, frame caches and runs go; the environment variable of the same name wins.
WORKSPACE = Path(os.environ.get("WORKSPACE", "workspace"))


@dataclass(frozen=True)
class MemoryOptions:
    """What makes a training run fit a card, and fast; finetune.py prints what it will take before it loads anything."""

    # Pack the base's linear maps (not lm_head) into 4 bits, NF4, as QLoRA does; for adapters only, on a GPU or a CPU.
    use_quantization: bool = False
    # Compute activations again in the backward pass: same gradients, less memory. True: each block whole, a third slower. selective: only what is
    # cheap (norms, SiLU, rotary), a tenth of the memory. auto: the least that makes it fit.
    gradient_checkpointing: bool | Literal["selective", "auto"] = "auto"
    # Number format in which the adapter is kept; it computes in the base's. bfloat16: 0.8 GiB less at full size, half of each update rounded away.
    lora_dtype: Literal["float32", "bfloat16"] = "float32"
    # paged_adamw_8bit: moments in 8 bits, a quarter of the memory, moved to the host when the card is full (bitsandbytes).
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    # torch.compile each block. Minutes at the start; not measured on a GPU yet.
    compile: bool = False


@dataclass(frozen=True)
class FinetuneConfig(MemoryOptions):
    # Base model: checkpoint folder, or hub id such as openvla/openvla-7b.
    vla_path: str = "openvla/openvla-7b"
    # Folder of RLDS data sets (modified_libero_rlds), or the hub id of such a data set.
    data_root_dir: str = str(WORKSPACE / "datasets")
    # Data set in it; several with commas, each with a weight after a colon if you like: a,b:0.5.
    dataset_name: str = "libero_spatial_no_noops"
    # Folder of run folders; the adapters land in <run_root_dir>/<run>/step-…, the newest also under <run>/latest.
    run_root_dir: Path = WORKSPACE / "runs"
    # Folder of frame caches: what was read from RLDS once, about as large as the data set.
    cache_dir: Path = WORKSPACE / "cache"
    # Samples of one pass of one process.
    batch_size: BatchSize = 16
    # Passes added up before a step: the effective batch is batch_size x this x the number of processes (torchrun).
    grad_accumulation_steps: int = 1
    # Of AdamW.
    learning_rate: float = 5e-4
    # constant (the recipe of record), or cosine down to zero at max_steps.
    lr_schedule: Literal["constant", "cosine"] = "constant"
    # Steps in which the learning rate rises from zero.
    warmup_steps: int = 0
    # Of AdamW.
    weight_decay: float = 0.01
    # Gradient norm above which gradients are scaled down; 0 never (the recipe of record).
    max_grad_norm: float = 0.0
    # Matrix products in bfloat16. auto: on a GPU only; it pays on a CPU that has instructions for it (lscpu: avx512_bf16, amx).
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    # Steps in a row whose loss or gradient is not finite, after which the run ends; each is skipped and reported.
    max_bad_steps: int = 10
    # Steps after which to stop.
    max_steps: int = 200_000
    # Steps between checkpoints.
    save_steps: int = 5000
    # Checkpoints to keep, beside the best on validation; the oldest are deleted.
    keep: int = 2
    # Steps between validations on held-out episodes, un-augmented; 0 never. The last step is validated too.
    val_steps: int = 5000
    # Share of the episodes held out, the last on disk, where a data set has no split named val (OpenVLA's 5 %).
    val_share: Share = 0.05
    # Actions become tokens by the data set's statistics (as in OpenVLA) or the base's: its tokens keep their meaning, better for little data.
    action_statistics: Literal["dataset", "base"] = "dataset"
    # Where the numbers go besides metrics.jsonl and curves.png.
    log_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    # Train a LoRA adapter; False trains every weight (a small model, or a large machine).
    use_lora: bool = True
    # With use_lora False and torchrun: every process holds a share of weights, gradients and optimizer (FSDP2), not all of them.
    shard: bool = False
    # Rank r of the adapter's matrices; alpha is min(r, 16).
    lora_rank: int = 32
    # Dropout in front of the adapter (0.05 in the reproduction this project starts from).
    lora_dropout: float = 0.0
    # Random crop, brightness, contrast, saturation, hue. With it, acting crops the centre.
    image_aug: bool = True
    # Which of them.
    augment_order: tuple[str, ...] = AUGMENTATIONS
    # Seed of the shuffling, the augmentations and the adapter's start.
    seed: Seed = 7
    # Loader processes.
    num_workers: int = 4
    # auto: the same command continues its run. never: refuse if the run exists.
    resume: Literal["auto", "never"] = "auto"
    # Is added to the run's name.
    run_id_note: FolderName | None = None
    # OpenVLA's shuffle buffer. Accepted, no longer needed: frames are read in random order from disk.
    shuffle_buffer_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """What stands beside a score: controls, and what is asked of the statistics."""

    # What the policy is told. swap: the sentence of another task of the suite. empty: nothing. paraphrase: LIBERO-PRO's wording, or where it
    # has none other verbs. A score that stays high shows that it doesn't read.
    instruction: Literal["keep", "swap", "empty", "paraphrase"] = "keep"
    # Play nothing: ask the checkpoint about frames of the data set, and compare its answers with what was recorded.
    open_loop: bool = False
    # Frames asked about, of the training episodes and as many of the validation episodes.
    open_loop_frames: int = 200
    # For replay and open_loop: folder of data sets (RLDS or LeRobot).
    data_root_dir: Path = WORKSPACE / "datasets"
    # The data set in it.
    dataset_name: str = "libero_spatial_no_noops"
    # Folder of frame caches.
    cache_dir: Path = WORKSPACE / "cache"
    # Fields of that data set, where they have no usual names: image=…,wrist=…,state=…,action=…,instruction=… (see docs/data.md).
    data_keys: str = ""
    # How that data set writes its gripper. auto: found from its values.
    gripper: GripperConvention = "auto"
    # Turn each image of that data set by 180°.
    rotate_images: bool = False
    # For a replay of LIBERO's own demonstrations: folder of their *_demo.hdf5 files, which hold the initial states.
    from_hdf5: Path | None = None
    # Difference in success that one would like to tell, as a fraction: how many episodes that needs is said.
    difference: float = 0.05
    # Of compare: the largest loss that still counts as "not worse", as a fraction. Choose it before looking.
    margin: float = 0.05
    # Play nothing: the mean over the suites of these rollout folders.
    mean_of: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    # An mp4 of every episode.
    save_videos: bool = True
    # Also a GIF of each, half as many frames a second.
    save_gifs: bool = False
    # Draw the instruction, and at the end the outcome, under the picture.
    annotate_videos: bool = False


@dataclass(frozen=True)
class EvalConfig(VideoOptions, ControlOptions):
    # Checkpoint folder, adapter folder (it knows its base), or hub id such as openvla/openvla-7b-finetuned-libero-spatial.
    pretrained_checkpoint: str = ""
    # Adapter folder that goes on top of the checkpoint.
    lora_checkpoint: Path | None = None
    # Who acts: the checkpoint; or, to check the set-up, the scripted expert, recorded actions from their own states (replay), random, zero.
    policy: Literal["checkpoint", "expert", "replay", "random", "zero"] = "checkpoint"
    # libero_spatial, libero_object, libero_goal, libero_10, libero_90, or a LIBERO-PRO suite such as libero_spatial_swap.
    task_suite_name: str = "libero_spatial"
    # Tasks of the suite, such as `--task_ids 0 3`; none means all.
    task_ids: tuple[int, ...] = ()
    # Stored initial states per task (LIBERO has 50); of a replay, recorded episodes per task.
    num_trials_per_task: int = 50
    # The first of them.
    first_init_state: int = 0
    # Steps of holding still before the policy acts; they do not count.
    num_steps_wait: int = 10
    # LIBERO's seed; it moves fixtures even with a stored initial state. Published numbers use 0.
    env_seed: Seed = 0
    # Seed of the random policy, and of sampling where a policy samples.
    seed: Seed = 7
    # Key of the data set's statistics. Only for a folder without processor.json that has several.
    unnorm_key: str | None = None
    # Whether it was trained with random crops. None: what the folder says, True where it says nothing.
    center_crop: bool | None = None
    # Weights in 8 or 4 bits (weight only). A folder that export.py quantised needs no flag.
    quantize: Literal["none", "int8", "int4"] = "none"
    # OpenVLA's name for bitsandbytes' LLM.int8, which rounds the activations too.
    load_in_8bit: bool = False
    # OpenVLA's name for bitsandbytes' NF4.
    load_in_4bit: bool = False
    # Guess each action from the last one and verify it: the same words in fewer passes. auto: on a CPU, where it measured faster.
    drafting: bool | Literal["auto"] = "auto"
    # Simulator processes, of each rank under torchrun. auto: one a core, as far as the memory goes (2 GB each).
    num_workers: Annotated[int | Literal["auto"], tyro.conf.arg(aliases=("--workers",))] = "auto"
    # Ask the policy one row at a time, so that not even rounding depends on the number of workers; slower.
    deterministic: bool = False
    # standard: LIBERO's pixels. fast: three times faster on a CPU, pixels differ by about 1.5 of 255, so not for scores to be compared.
    render_quality: Literal["standard", "fast"] = "standard"
    # Play again the episodes that ended as errors in an earlier call.
    retry_errors: bool = False
    # Play although mujoco or robosuite is another version than scores are made with; the result says so.
    allow_unpinned_simulator: bool = False
    # Folder of rollout folders.
    local_log_dir: Path = Path("rollouts")
    # Is added to the rollout folder's name.
    run_id_note: FolderName | None = None
    # Play nothing: compare two rollout folders, or several twos together (before after before after …), over the episodes that they share.
    compare: tuple[Path, ...] = ()
    model_family: Literal["openvla"] = "openvla"  # accepted because OpenVLA's command lines have it
