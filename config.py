"""What a person may change. Every field is also a flag of its script: `--help` shows the comment beside the field.

Most people change WORKSPACE and nothing else: data sets, runs and caches live below it.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from msgspec import Meta

from prismatic import ranges
from prismatic.filenames import STEP_FOLDER
from prismatic.image import AUGMENTATIONS, Change

GripperConvention = Literal["auto", "minus_one_open", "plus_one_open", "one_open", "zero_open", "none"]

# Where data sets, frame caches and runs go; the environment variable of the same name wins.
WORKSPACE = Path(os.path.expanduser(os.environ.get("WORKSPACE", "workspace"))).absolute()


@dataclass(frozen=True)
class FinetuneConfig:
    # Model to start from: checkpoint folder, or hub id such as openvla/openvla-7b.
    vla_path: str = "openvla/openvla-7b"
    # Folder of data sets (RLDS or LeRobot), or the hub id of such a data set.
    data_root_dir: str = str(WORKSPACE / "datasets")
    # Name of the data set in data_root_dir; several with commas, each with a weight after a colon if you like: a,b:0.5.
    dataset_name: str = "libero_spatial_no_noops"
    # Folder for runs. Checkpoints land in <run_root_dir>/<run>/step-…, the newest also under <run>/latest.
    run_root_dir: Path = WORKSPACE / "runs"
    # Text that is added to the run's name.
    run_id_note: ranges.FolderName | None = None
    # How actions come out. tokens: one by one (OpenVLA). parallel, l1: a chunk in one pass, of tokens or regressed (OpenVLA-OFT). None: as the base.
    action_head: ranges.ActionHead | None = None
    # Cameras that the model sees: 1 the agent view, 2 also the wrist view. None: as many as the model to start from.
    num_images_in_input: ranges.Images | None = None
    # Whether the model reads the robot's state (proprioception). None: as the model to start from.
    use_proprio: bool | None = None
    # Train a LoRA adapter (and an action head whole). False trains every weight: for a small model, or a large machine.
    use_lora: bool = True
    # Rank r of the LoRA adapter's matrices; alpha is min(r, 16).
    lora_rank: ranges.Rank = 32
    # Keep the frozen base's linear layers (not lm_head) in 4 bits, NF4, as QLoRA does. Only with use_lora.
    use_quantization: bool = False
    # Samples of one forward pass of one process (the micro-batch).
    batch_size: ranges.BatchSize = 16
    # Micro-batches whose gradients are added up for a step: a step has batch_size x this x the number of processes (torchrun) samples.
    grad_accumulation_steps: ranges.BatchSize = 1
    # Learning rate of AdamW.
    learning_rate: ranges.LearningRate = 5e-4
    # Number of optimizer steps of the whole run.
    max_steps: ranges.Positive = 200_000
    # Steps between checkpoints.
    save_steps: ranges.Positive = 5000
    # Steps between validations on held-out episodes, without augmentation; 0 never. The last step is validated too.
    val_steps: ranges.Count = 5000
    # Augment images at random: crop, brightness, contrast, saturation, hue. With it, the policy crops the centre when it acts.
    image_aug: bool = True
    # Processes that load data, beside each training process.
    num_workers: ranges.Processes = 4
    # Where the numbers go besides metrics.jsonl and curves.png.
    log_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    # Seed of shuffling, augmentation, and new weights (adapter, head).
    seed: ranges.Seed = 7

    # Advanced: few people change what follows.

    # Actions that one query answers with. None: as many as the model to start from, 8 for a new head.
    num_actions_chunk: ranges.Few | None = None
    # Fields of the data set that are meant, where they don't have their usual names; docs/data.md says how to write them.
    data_keys: str = ""
    # How the data set writes its gripper's command. auto: found from the recorded values and said; none: its last number is no gripper.
    gripper: GripperConvention = "auto"
    # Turn the data set's images by 180°: for data recorded upside down, as LIBERO's cameras give it.
    rotate_images: bool = False
    # Folder of frame caches: each image of the data sets as a JPEG, as large as they are, or ten times that where they are videos.
    cache_dir: Path = WORKSPACE / "cache"
    # Recompute activations in the backward pass, to save memory. True: whole blocks, a third slower. selective: cheap parts. auto: as little as fits.
    gradient_checkpointing: bool | Literal["selective", "auto"] = "auto"
    # dtype in which the LoRA adapter is kept (it computes in the base's). bfloat16: 1 GiB less at full size, half of each update rounded away.
    lora_dtype: Literal["float32", "bfloat16"] = "float32"
    # Dropout in front of the LoRA adapter (OpenVLA: 0).
    lora_dropout: ranges.BelowOne = 0.0
    # adamw, or paged_adamw_8bit (bitsandbytes): moments in 8 bits, a quarter of the memory; moved to the host where the GPU is full, until a resume.
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    # torch.compile each block. Minutes at the start; not measured on a GPU yet.
    compile: bool = False
    # Matrix products in bfloat16 while weights are float32. auto: on a GPU only; on a CPU it pays where lscpu shows avx512_bf16 or amx.
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    # With use_lora False and torchrun: split weights, gradients and optimizer among the processes (FSDP2) instead of copying them.
    shard: bool = False
    # Schedule of the learning rate: constant (OpenVLA), or cosine down to zero at max_steps.
    lr_schedule: Literal["constant", "cosine"] = "constant"
    # Step from which the learning rate is a tenth; 0 never. OpenVLA-OFT's num_steps_before_decay: 100000 in its LIBERO recipe.
    lr_decay_step: ranges.Count = 0
    # Steps in which the learning rate rises at the start.
    warmup_steps: ranges.Count = 0
    # Share of the learning rate at which warmup_steps begin (OpenVLA-OFT's lr_warmup_steps: 0.1).
    warmup_start: ranges.Share = 0.0
    # Weight decay of AdamW.
    weight_decay: ranges.Share = 0.01
    # Gradient norm above which gradients are scaled down to it; 0 never (OpenVLA).
    max_grad_norm: ranges.NonNegative = 0.0
    # Skipped steps in a row after which the run ends; a step is skipped and reported where its loss or gradient is not finite.
    max_bad_steps: ranges.Positive = 10
    # Checkpoints to keep beside the best on validation; the oldest are deleted.
    keep: ranges.Positive = 2
    # Share of the episodes held out for validation (RLDS: the last, LeRobot: drawn), where a data set has no split for it (OpenVLA: 5 %).
    val_share: ranges.BelowOne = 0.05
    # Statistics that actions are normalised by: the data set's (OpenVLA) or the base's, so that tokens keep their meaning (better for little data).
    action_statistics: Literal["dataset", "base"] = "dataset"
    # Augmentations that image_aug applies.
    augment_order: tuple[Change, ...] = AUGMENTATIONS
    # Steps between lines of metrics.jsonl.
    log_steps: ranges.Positive = 10
    # Project that wandb or trackio shows the run in.
    wandb_project: str | None = None
    # Account or team that wandb shows the run under.
    wandb_entity: str | None = None
    # What to do where the run exists. auto: go on with it. never: refuse.
    resume: Literal["auto", "never"] = "auto"

    @property
    def run_name(self) -> str:
        """OpenVLA's run id: model, data, effective batch, learning rate, adapter, note."""
        base = Path(self.vla_path)
        base = base.parent if STEP_FOLDER.fullmatch(base.name) else base
        name = f"{base.name}+{self.dataset_name.rstrip('/').replace(',', '_').replace(':', '-')}"
        name += f"+b{self.batch_size * self.grad_accumulation_steps}+lr-{self.learning_rate:g}"
        name += f"+lora-r{self.lora_rank}+dropout-{self.lora_dropout:g}" * self.use_lora
        name += f"--{self.run_id_note}" * bool(self.run_id_note)
        return name + "--image_aug" * self.image_aug


MAY_CHANGE_ON_RESUME = (  # batch_size and grad_accumulation_steps as far as their product, which is in the run's name, stays
    "max_steps", "save_steps", "val_steps", "log_steps", "log_to", "wandb_project", "wandb_entity", "max_bad_steps", "keep", "num_workers",
    "resume", "vla_path", "data_root_dir", "run_root_dir", "cache_dir",  # base and data are told by their fingerprints
    "batch_size", "grad_accumulation_steps", "shard", "gradient_checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class EvalConfig:
    # Checkpoint folder, adapter folder (it knows its base), training run, or hub id such as openvla/openvla-7b-finetuned-libero-spatial.
    pretrained_checkpoint: str = ""
    # Adapter folder that goes on top of pretrained_checkpoint.
    lora_checkpoint: Path | None = None
    # Who acts: the checkpoint; or, to check the set-up, the scripted expert, recorded actions from their own states (replay), random, zero.
    policy: Literal["checkpoint", "expert", "replay", "random", "zero"] = "checkpoint"
    # libero_spatial, libero_object, libero_goal, libero_10, libero_90, or a LIBERO-PRO suite such as libero_spatial_swap.
    task_suite_name: str = "libero_spatial"
    # Tasks of the suite to play, such as `--task_ids 0 3`; none means all.
    task_ids: tuple[ranges.Count, ...] = ()
    # Episodes per task, each from another stored initial state (LIBERO has 50); of a replay, recorded episodes per task.
    num_trials_per_task: ranges.Positive = 50
    # Actions of each chunk that are executed before the policy looks again, the first ones. None: the whole chunk.
    num_open_loop_steps: ranges.Positive | None = None
    # Key of the data set whose statistics the actions are in; for a foreign folder that has several, or a policy that learnt from several data sets.
    unnorm_key: str | None = None
    # Whether the policy was trained with random crops. None: what the folder says, True where it says nothing.
    center_crop: bool | None = None
    # Weights in 8 or 4 bits (weight only). A folder that export.py quantised needs no flag.
    quantize: Literal["none", "int8", "int4"] = "none"
    # Simulator processes, of each rank under torchrun. auto: one a core, beside a GPU's policy one less, as far as memory goes.
    num_workers: Annotated[ranges.Workers | Literal["auto"], tyro.conf.arg(aliases=("--workers",))] = "auto"
    # Ask the policy one row at a time, so that not even rounding depends on the number of workers; slower.
    deterministic: bool = False
    # standard: LIBERO's pixels. fast: seven times faster on a CPU, pixels differ by about 2 of 255, so not for scores to be compared.
    render_quality: Literal["standard", "fast"] = "standard"
    # Write an mp4 of the episodes that video_every chooses. Without videos, a policy with chunks has its images rendered only when it looks.
    save_videos: bool = True
    # Film each so many-th initial state of a task: 1 films all, 10 one in ten.
    video_every: ranges.Positive = 1
    # LIBERO's seed; it moves fixtures even with a stored initial state. Published numbers use 0.
    env_seed: ranges.Seed = 0
    # Seed of the random policy.
    seed: ranges.Seed = 7
    # Play again the episodes that ended as errors in an earlier call.
    retry_errors: bool = False
    # Folder in which each run has its rollout folder.
    local_log_dir: Path = Path("rollouts")
    # Text to be added to the rollout folder's name.
    run_id_note: ranges.FolderName | None = None
    # Play nothing: compare two rollout folders (before after), or several pairs of them together, over the episodes that they share.
    compare: tuple[Path, ...] = ()

    # Advanced: details of the protocol, foreign checkpoints, controls, videos. Most evaluations leave these as they are.

    # First stored initial state of each task to be played; num_trials_per_task counts from it.
    first_init_state: ranges.Count = 0
    # Steps of holding still before the policy acts; they count for nothing. LIBERO's protocol has 10.
    num_steps_wait: Annotated[int, Meta(ge=0, le=1000)] = 10
    # Of a foreign checkpoint without a head's file: parallel (all tokens of a chunk at once, as RL checkpoints of OpenVLA-OFT). None: as found.
    action_head: ranges.ActionHead | None = None
    # Of a foreign checkpoint: actions of one answer. None: as the folder says, else 8, as OpenVLA-OFT published for LIBERO.
    num_actions_chunk: ranges.Few | None = None
    # Of a foreign checkpoint: images that it reads, 2 adds the wrist camera. None: as the folder says, else 2 where it reads a state.
    num_images_in_input: ranges.Images | None = None
    # Weights in 8 bits by bitsandbytes' LLM.int8, which rounds activations too (OpenVLA's flag; --quantize int8 rounds weights only).
    load_in_8bit: bool = False
    # Weights in 4 bits by bitsandbytes' NF4 (OpenVLA's flag; --quantize int4, in torch: the decoder in 4 bits, head and projector in 8).
    load_in_4bit: bool = False
    # Draft each action's tokens from the last action and verify them: the same tokens in fewer forward passes. auto: yes, but not with bitsandbytes.
    drafting: bool | Literal["auto"] = "auto"
    # Play although mujoco or robosuite is another version than scores are made with; the result says so.
    allow_unpinned_simulator: bool = False
    # Draw the instruction, and at the end the outcome, under the video's frames.
    annotate_videos: bool = False
    # Control: what the policy is told. swap: another task's sentence. empty: nothing. paraphrase: other words. Still a high score: it doesn't read.
    instruction: Literal["keep", "swap", "empty", "paraphrase"] = "keep"
    # Control: play nothing, ask the checkpoint about frames of a data set and compare its answers with what was recorded.
    open_loop: bool = False
    # Frames that --open_loop asks about: so many of the training episodes and of the validation episodes.
    open_loop_frames: ranges.Positive = 200
    # Folder of data sets (RLDS or LeRobot), for --policy replay and --open_loop.
    data_root_dir: Path = WORKSPACE / "datasets"
    # Data set in data_root_dir, for --policy replay and --open_loop.
    dataset_name: str = "libero_spatial_no_noops"
    # Folder of frame caches, for --policy replay and --open_loop.
    cache_dir: Path = WORKSPACE / "cache"
    # Fields of that data set, where they have no usual names: image=…,wrist=…,state=…,action=…,instruction=… (see docs/data.md).
    data_keys: str = ""
    # How that data set writes its gripper. auto: found from its values.
    gripper: GripperConvention = "auto"
    # Turn each image of that data set by 180°.
    rotate_images: bool = False
    # Share of that data set's episodes that was held out when the checkpoint learnt (finetune.py's flag): --open_loop counts them apart.
    val_share: ranges.BelowOne = 0.05
    # Folder of LIBERO's *_demo.hdf5 files, which hold the initial states that --policy replay of LIBERO's own demonstrations needs.
    from_hdf5: Path | None = None
    # Difference in success rate, as a fraction, that you would like to tell: the result says how many episodes that takes.
    difference: ranges.Share = 0.05
    # Largest loss in success rate, as a fraction, that --compare still calls "not worse". Choose it before looking.
    margin: ranges.Share = 0.05
    # Play nothing: print the mean success rate over the suites of these rollout folders.
    mean_of: tuple[Path, ...] = ()
