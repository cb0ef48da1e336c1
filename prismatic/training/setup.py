"""What is made and checked before a run's first step: data, model choice, processor, run folder, and whether all of it fits together.

In: values that a person gave. Out: the parts of a TrainingRun. Each error is one sentence that names the flag.
"""

import dataclasses
import hashlib
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from prismatic.adapter import save_adapter
from prismatic.checkpoint import save_checkpoint
from prismatic.data.frames import Mixture
from prismatic.data.loader import PREFETCHED
from prismatic.data.mixture import open_mixture, sentences
from prismatic.dataset_statistics import check_entry, load_statistics, statistics_key
from prismatic.errors import ConfigError
from prismatic.filenames import ADAPTER_CONFIG, CONFIG, PROCESSOR, SKIPPED, TOKENIZER, TRAINING_STATE
from prismatic.head_files import PUBLISHED_CHUNK, model_config
from prismatic.hub import local, resolve
from prismatic.models import quantize, weights
from prismatic.models.vla import VLA, VLAConfig
from prismatic.processor import IMAGE_MARK, Processor, ProcessorConfig
from prismatic.processor_files import check_state, check_tokenizer, load_tokenizer, read_processor
from prismatic.training.distributed import Ranks
from prismatic.training.loggers import check_installed
from prismatic.training.model import ModelOptions
from prismatic.training.run_folder import RunFolder
from prismatic.training.state import Progress

SHARED_MEMORY = Path("/dev/shm")  # where the loader's processes put their batches


@dataclass(frozen=True)
class RunOptions(ModelOptions):
    """config.py's options of these names: what is learnt from what, and by what model."""

    vla_path: str
    data_root_dir: str
    dataset_name: str
    data_keys: str
    gripper: str
    rotate_images: bool
    cache_dir: Path
    seed: int
    max_steps: int
    warmup_steps: int
    val_share: float
    batch_size: int
    num_workers: int
    image_aug: bool
    augment_order: tuple[str, ...]
    action_statistics: str  # "dataset" or "base"
    action_head: str | None
    num_actions_chunk: int | None
    num_images_in_input: int | None
    use_proprio: bool | None
    log_to: str
    wandb_project: str | None
    wandb_entity: str | None


@dataclass(frozen=True)
class Task:
    """What a run learns: data for a model of this config, and the processor between them."""

    base: Path
    base_fingerprint: str
    config: VLAConfig
    mixture: Mixture
    processor: Processor

    @property
    def identity(self) -> dict[str, Any]:
        """What tells base and data apart wherever they lie."""
        data = {cache.name: cache.fingerprint for cache in self.mixture.caches}  # of images, words and actions
        found = {"base": self.base_fingerprint, "data": data, "samples": len(self.mixture)}
        if self.config.proprio_dim:
            states = ((cache.name, np.ascontiguousarray(cache.state).tobytes()) for cache in self.mixture.caches)
            found["states"] = {name: hashlib.blake2b(state, digest_size=16).hexdigest() for name, state in states}
        return found

    @cached_property
    def longest_row(self) -> int:
        """Tokens of the longest training row, without image patches."""
        processor = self.processor
        widest = max(len(entry["action"]["q01"]) for entry in processor.statistics.values())
        widest *= processor.config.num_actions_chunk
        texts = (processor.shortened(text, widest) for text in self.mixture.instructions)
        return max(len(processor.prompt_ids(text)) for text in texts) + widest + 1  # the end token


@dataclass
class TrainingRun:
    """What the loop works on."""

    ranks: Ranks
    task: Task
    folder: RunFolder
    vla: VLA
    optimizer: torch.optim.Optimizer
    progress: Progress
    micro_batch_size: int  # samples of a forward pass of this process
    grad_accumulation_steps: int  # micro-batches of a step
    autocast: bool  # whether products are in bfloat16 where weights are float32

    def describe(self) -> str:
        """A line or two before the first step."""
        parameters = list(self.vla.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        place = self.ranks.device + f" x {self.ranks.size}" * (self.ranks.size > 1)
        return (
            f"{self.folder.path}: {trained:,} of {sum(p.numel() for p in parameters):,} parameters are trained\n"
            f"{len(self.task.mixture):,} samples an epoch, {self.progress.effective_batch} samples each, on {place}"
        )


def check_flags(options: RunOptions, ranks: Ranks) -> None:
    """Values that can't work, before anything is opened or fetched."""
    local(options.data_root_dir, "dataset")
    if options.shard and options.use_lora:
        raise ConfigError("--shard is for --use_lora False: an adapter's base is not trained, so leave --shard out")
    if options.shard and ranks.size == 1:
        print("notice: --shard has nobody to share with: start it with torchrun --nproc-per-node")
    if options.shard and ranks.size > 1 and options.optimizer != "adamw":
        raise ConfigError(
            f"--optimizer {options.optimizer} keeps whole moments and can't be split: give adamw with --shard"
        )
    if options.use_quantization and not options.use_lora:
        raise ConfigError("--use_quantization packs a base that isn't trained: leave out --use_lora False")
    if options.log_to not in ("wandb", "trackio") and (options.wandb_project or options.wandb_entity):
        print("notice: --wandb_project and --wandb_entity have no effect without --log_to wandb")
    if options.warmup_steps > options.max_steps:
        print("notice: --warmup_steps is more than --max_steps: the learning rate never reaches --learning_rate")
    check_installed(options.log_to)


def open_task(options: RunOptions, ranks: Ranks) -> Task:
    """Base, data and processor. Downloads and frame caches are made by the main process and found by the others."""
    ranks.on_main_process(lambda: check_flags(options, ranks))
    base = ranks.main_process_first(lambda: resolve(options.vla_path))
    config = ranks.on_main_process(lambda: choose_model(base, options))
    check_shared_memory(config, batch_size=options.batch_size, num_workers=options.num_workers)
    mixture = ranks.main_process_first(
        lambda: open_mixture(
            options.data_root_dir, options.dataset_name, cache_dir=options.cache_dir, seed=options.seed, val_share=options.val_share,
            num_actions_chunk=config.num_actions_chunk, data_keys=options.data_keys, gripper=options.gripper,
            rotate_images=options.rotate_images,
        )
    )  # fmt: skip
    for cache in mixture.caches:
        print(*sentences(cache, rotate_images=options.rotate_images), sep="\n")
    config = ranks.on_main_process(lambda: fit_to_data(config, mixture))
    fingerprint = ranks.on_main_process(lambda: weights.fingerprint(weights.stored_tensors(base)))
    processor = ranks.main_process_first(lambda: build_processor(base, config, mixture, fingerprint, options))
    for text in mixture.instructions:
        if processor.shortened(text, config.action_positions) != text.replace(IMAGE_MARK, ""):
            print(f"notice: an instruction is longer than the model reads, its end is cut off: {text[:60]!r}…")
    return Task(base, fingerprint, config, mixture, processor)


def choose_model(base: Path, options: RunOptions) -> VLAConfig:
    """The base's config with what was asked for in its place; proprio_dim is 1 until the data says how many numbers a new state has."""
    if (base / ADAPTER_CONFIG).exists():
        merge = f"python export.py --checkpoint {base} --output NEW"
        raise ConfigError(f"--vla_path {base} is an adapter: merge it by {merge}, and give NEW")
    quantize.refuse(base / CONFIG, "training needs weights that are not")
    given = {"action_head": options.action_head, "num_images_in_input": options.num_images_in_input}
    found, chunk = model_config(base, new_heads=True, **given), options.num_actions_chunk
    tokens = found.action_head == "tokens"
    if chunk is None:
        chunk = 1 if tokens else PUBLISHED_CHUNK if found.num_actions_chunk == 1 else found.num_actions_chunk
    reads_state = bool(found.proprio_dim) if options.use_proprio is None else options.use_proprio
    state = (found.proprio_dim or 1) if reads_state else 0
    return dataclasses.replace(found, num_actions_chunk=chunk, proprio_dim=state)


def fit_to_data(config: VLAConfig, mixture: Mixture) -> VLAConfig:
    """The config with the data's sizes of action and state; ConfigError where the data lacks what the model looks at."""
    chunk = config.num_actions_chunk
    for cache in mixture.caches:
        if config.num_images_in_input == 2 and not cache.has_wrist:
            raise ConfigError(
                f"data set {cache.name} has no wrist images, and the model sees two: "
                "name their camera by --data_keys wrist=…, or give --num_images_in_input 1"
            )
        if config.proprio_dim and cache.state is None:
            raise ConfigError(
                f"data set {cache.name} has no robot state: name it by --data_keys state=…, or give --use_proprio False"
            )
        if short := cache.episodes_shorter_than(chunk):
            print(f"notice: {short} episodes of {cache.name} are shorter than {chunk} steps and give no sample")
    widths = {cache.state.shape[1] for cache in mixture.caches if cache.state is not None}
    if config.proprio_dim and len(widths) > 1:
        raise ConfigError(f"the data sets' robot states have {sorted(widths)} numbers: train them one by one")
    state = widths.pop() if config.proprio_dim else 0
    return dataclasses.replace(config, action_dim=mixture.action_dim, proprio_dim=state)


def build_processor(
    base: Path, config: VLAConfig, mixture: Mixture, fingerprint: str, options: RunOptions
) -> Processor:
    """What the run learns with, and its policy will act with."""
    names = [cache.name for cache in mixture.caches]
    statistics = mixture.statistics
    if not config.proprio_dim:
        # zeros as in OpenVLA's own files: a folder with statistics of a state is taken for one that reads it
        zeros = {name: [0.0] * config.action_dim for name in ("mean", "std", "max", "min", "q01", "q99")}
        statistics = {name: entry | {"proprio": zeros} for name, entry in statistics.items()}
    if options.action_statistics == "base":
        statistics = dict.fromkeys(names, base_entry(base, config))
    processor = ProcessorConfig.for_model(
        config,
        unnorm_key=names[0] if len(names) == 1 or options.action_statistics == "base" else None,
        center_crop=options.image_aug and "random_resized_crop" in options.augment_order,
        base_model=str(base.resolve()) if Path(options.vla_path).is_dir() else options.vla_path,
        base_fingerprint=fingerprint if options.use_lora else "",
    )
    for name in names if options.action_statistics == "dataset" else ():
        way_out = "leave that data set out, or mend its recordings"
        where = f"the statistics of {name}"
        check_entry(statistics[name], where, state=config.proprio_dim > 0, whole=True, way_out=way_out)
    tokenizer = load_tokenizer(base)
    check_tokenizer(tokenizer, processor, base / TOKENIZER)
    return Processor(processor, tokenizer, statistics)


def base_entry(base: Path, config: VLAConfig) -> Mapping[str, Any]:
    """The base's statistics, for --action_statistics base. ConfigError where they aren't of such actions or states."""
    learnt, own = load_statistics(base), base / PROCESSOR
    try:
        key = statistics_key(learnt, read_processor(own).unnorm_key if own.exists() else None, base)
        entry, where = learnt[key], f"{base}, statistics of {key}"
        check_entry(entry, where, state=config.proprio_dim > 0, whole=True)
        check_state(entry, config.proprio_dim, where)
        if (size := len(entry["action"]["q01"])) != config.action_dim:
            raise ConfigError(f"{where}: of actions of {size} numbers, the data's have {config.action_dim}")
    except ConfigError as error:
        raise ConfigError(f"--action_statistics base: {error}; or give --action_statistics dataset") from None
    return entry


def check_shared_memory(config: VLAConfig, *, batch_size: int, num_workers: int) -> None:
    """ConfigError where the loader's processes would find no room for their batches: they would wait for ever, or be killed."""
    if not num_workers or not SHARED_MEMORY.is_dir():
        return
    sample = 6 * 4 * config.num_images_in_input * config.image_size**2  # bytes of its float32 pixels
    processes = num_workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    wanted, free = processes * PREFETCHED * batch_size * sample, shutil.disk_usage(SHARED_MEMORY).free
    if wanted > free:
        raise ConfigError(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MB free, and {processes} loader processes want {wanted / 2**20:.0f}: give --num_workers 0, "
            "a smaller --batch_size, or the container more of it (docker run --shm-size 1g)"
        )


def open_run(
    path: Path, options: Mapping[str, Any], ranks: Ranks, *, keep: int, resume: str, may_change: tuple[str, ...]
) -> tuple[RunFolder, Path | None, dict[str, Any] | None]:
    """The run's folder, the step folder to go on from and its state; None in a new run. ConfigError where options differ from the run's."""
    folder = RunFolder(path, keep=keep, ranks=ranks)

    def newest() -> Path | None:
        if folder.checkpoints() and resume == "never":
            raise ConfigError(f"{path} exists and --resume is never: give a --run_id_note, or delete it")
        found = folder.newest_whole()
        if found is not None:
            print(f"going on from {found}")
        folder.check_options(options, may_change=may_change)
        folder.cut_metrics(found)
        return found

    resumed = ranks.on_main_process(newest)
    if resumed is None:
        return folder, None, None
    return folder, resumed, torch.load(resumed / TRAINING_STATE, map_location="cpu", weights_only=True, mmap=True)


def divide(
    state: Mapping[str, Any] | None, ranks: Ranks, *, batch_size: int, grad_accumulation_steps: int
) -> tuple[Progress, tuple[int, int]]:
    """Where a run begins, and (micro_batch_size, grad_accumulation_steps) of each rank. A resumed run keeps the samples of a step."""
    asked = batch_size * grad_accumulation_steps * ranks.size
    progress = Progress(state["effective_batch"] if state else asked)
    sizes = progress.micro_batches(ranks, batch_size)
    if progress.effective_batch != asked:
        print(
            f"this run's steps have {progress.effective_batch} samples: {sizes[1]} x {sizes[0]} on each of {ranks.size}"
        )
    return progress, sizes


def report_skipped(run: TrainingRun, numbers: Mapping[str, float]) -> None:
    """Say which frames were in the last step, whose loss or gradient is not finite."""
    progress, mixture = run.progress, run.task.mixture
    origins = [mixture.origin(draw) for draw in range(progress.draws - progress.effective_batch, progress.draws)]
    frames = ", ".join(f"{dataset} episode {episode} frame {frame}" for dataset, episode, frame in origins)
    reason = f"loss {numbers['loss']}, gradient norm {numbers['grad_norm']}"
    if run.ranks.is_main:
        tqdm.write(f"step {progress.step} skipped: {reason}; its batch: {frames}", file=sys.stderr)
        run.folder.log({"step": progress.step, "reason": reason, "frames": origins}, SKIPPED)


def too_many_bad_steps(run: TrainingRun) -> ConfigError:
    """The sentence that ends such a run."""
    return ConfigError(
        f"{run.progress.bad_steps} steps in a row had a loss or gradient that is not finite: {run.folder.path / SKIPPED} names their frames; "
        "give a lower --learning_rate or a --max_grad_norm, and a --run_id_note"
    )


def write_weights(
    folder: Path, run: TrainingRun, *, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
) -> None:
    """An adapter folder, or where all weights are trained a checkpoint folder. tensors: the whole model's."""
    processor = run.task.processor
    learnt = run.vla.parameters() if options["use_lora"] else tensors.values()
    if not all(bool(tensor.isfinite().all()) for tensor in learnt if tensor.is_floating_point()):
        raise ConfigError(
            f"after step {run.progress.step} weights are NaN or infinite, so they are not saved: the steps before are kept; a smaller "
            "--learning_rate begins a run of its own, from such a step where export.py makes a --vla_path of it"
        )
    given: dict[str, Any] = {"processor": processor, "statistics": processor.statistics}
    if options["use_lora"]:
        save_adapter(folder, run.vla, options=options, **given)
    else:
        save_checkpoint(
            folder, run.vla, tensors=dict(tensors), tokenizer_from=run.task.base, dtype=torch.float32, **given
        )
