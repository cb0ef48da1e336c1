"""Fine-tune an OpenVLA policy on RLDS demonstrations: a LoRA adapter, or with --use_lora False all of a small model.

    python finetune.py --vla_path openvla/openvla-7b --data_root_dir datasets --dataset_name libero_spatial_no_noops

Writes <run_root_dir>/<run>/latest, which eval.py takes as --pretrained_checkpoint. Ctrl-C saves; the same command goes on from there.
Several GPUs: torchrun --nproc-per-node N finetune.py …
"""

import dataclasses
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from config import FinetuneConfig
from prismatic.checkpoint import save_checkpoint
from prismatic.data.examples import Examples, batches
from prismatic.data.frames import DrawBatches, Mixture
from prismatic.data.mixture import open_mixture
from prismatic.dataset_statistics import load_statistics, statistics_key
from prismatic.errors import ConfigError, Terminated, exit_codes
from prismatic.filenames import CONFIG, FIRST_BATCH, LATEST, SKIPPED, STEP_FOLDER
from prismatic.hub import resolve
from prismatic.image import AUGMENTATIONS
from prismatic.models import quantize, weights
from prismatic.models.vla import VLA, VLAConfig
from prismatic.processor import Batch, Processor, ProcessorConfig
from prismatic.processor_files import load_tokenizer
from prismatic.ranges import checked
from prismatic.training import first_batch
from prismatic.training.display import Display
from prismatic.training.distributed import Ranks, joined
from prismatic.training.loggers import NoLogger, check_installed, open_logger
from prismatic.training.model import ModelOptions, planned_model
from prismatic.training.optimizer import make_optimizer
from prismatic.training.run_folder import RunFolder
from prismatic.training.state import Progress, capture, restore, seed_everything
from prismatic.training.step import Metrics, StopSignal, backward, clip_gradients, learning_rate
from prismatic.training.validation import BEST_BY, Validation, is_best

LOG_STEPS = 10  # steps between lines of metrics.jsonl
MAY_CHANGE = (  # on resuming; batch_size and passes as far as their product, the effective batch, stays
    "max_steps", "save_steps", "val_steps", "log_to", "max_bad_steps", "keep", "num_workers", "resume", "shuffle_buffer_size",
    "run_root_dir", "cache_dir",
    "batch_size", "grad_accumulation_steps", "shard", "gradient_checkpointing",
)  # fmt: skip


@dataclass
class Job:
    """What the loop works on."""

    cfg: FinetuneConfig
    ranks: Ranks
    mixture: Mixture
    processor: Processor
    run: RunFolder
    vla: VLA
    optimizer: torch.optim.Optimizer
    progress: Progress
    batch_size: int  # samples of a pass of this process
    passes: int  # of a step


def main(cfg: FinetuneConfig) -> Path:
    cfg = checked(cfg)
    with joined() as ranks:
        ranks.on_first(lambda: check(cfg, ranks))
        job = prepare(cfg, ranks)
        train(job)
        print(f"done: {job.run.path / LATEST} is what eval.py takes as --pretrained_checkpoint")
        return job.run.path / LATEST


def prepare(cfg: FinetuneConfig, ranks: Ranks) -> Job:
    """Data, model and optimizer, as the run's last checkpoint left them if there is one."""
    seed_everything(cfg.seed)  # the same on all ranks, which have to draw the same adapter
    mixture = ranks.first_then_all(
        lambda: open_mixture(
            find_data(cfg), cfg.dataset_name, cache_dir=cfg.cache_dir, seed=cfg.seed, val_share=cfg.val_share
        )
    )
    base = ranks.first_then_all(lambda: resolve(cfg.vla_path))
    quantize.refuse(base / CONFIG, "training needs weights that are not")
    processor = build_processor(cfg, base, mixture)
    run = RunFolder(cfg.run_root_dir / run_name(cfg), keep=cfg.keep, ranks=ranks)
    resumed = ranks.on_first(lambda: last_checkpoint(cfg, run))
    state = run.load_state(resumed) if resumed else None
    effective_batch = cfg.batch_size * cfg.grad_accumulation_steps * ranks.size
    progress = Progress(state["effective_batch"] if state else effective_batch)
    batch_size, passes = progress.passes(ranks, cfg.batch_size)
    if progress.effective_batch != effective_batch:
        print(
            f"this run's steps have {progress.effective_batch} samples: {passes} x {batch_size} on each of {ranks.size}"
        )
    data = {cache.name: cache.fingerprint for cache in mixture.caches}
    ranks.on_first(lambda: run.check_options(dataclasses.asdict(cfg) | {"data": data}, may_change=MAY_CHANGE))
    ranks.on_first(lambda: run.cut_metrics(resumed))
    words = processor.longest_row(mixture.instructions)
    vla = build_model(cfg, base, resumed, ranks, batch_size=batch_size, passes=passes, words=words)
    trainable = [parameter for parameter in vla.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(cfg.optimizer, trainable, learning_rate=cfg.learning_rate, weight_decay=cfg.weight_decay)
    if state:
        progress = restore(state, optimizer, ranks, seed=cfg.seed)
    elif not ranks.is_first:
        seed_everything(cfg.seed, rank=ranks.rank)  # from here on each has its own: dropout must differ
    print(
        f"{run.path}: {sum(p.numel() for p in trainable):,} of {sum(p.numel() for p in vla.parameters()):,} parameters are trained"
    )
    print(
        f"{len(mixture):,} frames a pass over the data; steps {progress.step} to {cfg.max_steps}, {progress.effective_batch} samples each, "
        f"on {ranks.device}" + f" x {ranks.size}" * (ranks.size > 1)
    )
    return Job(cfg, ranks, mixture, processor, run, vla, optimizer, progress, batch_size, passes)


def train(job: Job) -> None:
    """What surrounds the loop: who validates, who shows what happens."""
    cfg, ranks, run = job.cfg, job.ranks, job.run
    validation = Validation(job.mixture, job.processor, batch_size=job.batch_size, ranks=ranks)
    if cfg.val_steps and not validation.frames:
        print("notice: of so few episodes none is held out, so nothing is validated: --val_share 0.2 holds out a fifth")
    logger = NoLogger()
    if ranks.is_first:
        logger = open_logger(cfg.log_to, run.path, options=dataclasses.asdict(cfg), first_step=job.progress.step)
    with Display(run, logger, job.progress, max_steps=cfg.max_steps, log_steps=LOG_STEPS, ranks=ranks) as display:
        loop(job, validation, display)


def loop(job: Job, validation: Validation, display: Display) -> None:
    """The steps. A stop signal ends them after the present one, saved."""
    cfg, ranks, progress, vla = job.cfg, job.ranks, job.progress, job.vla
    model = ranks.parallel(vla)
    stream = open_stream(job)
    autocast = in_bfloat16(cfg, ranks)
    stop = StopSignal()
    tokenizer = job.processor.action_tokenizer
    vla.train()
    for step in range(progress.step, cfg.max_steps):
        set_learning_rate(job)
        passes = [next(stream) for _ in range(job.passes)]
        if step == 0 and ranks.is_first:
            first_batch.draw(passes, job.processor, job.run.path / FIRST_BATCH)
        metrics = backward(model, passes, tokenizer, autocast=autocast, ranks=ranks)
        metrics.grad_norm = clip_gradients(vla.parameters(), cfg.max_grad_norm)
        progress.step = step + 1
        if metrics.is_finite():
            job.optimizer.step()
            progress.bad_steps = 0
        else:
            report_skipped(job, metrics)
        job.optimizer.zero_grad()
        validated = {}
        if metrics.is_finite() and validation.due(progress.step, every=cfg.val_steps, last=cfg.max_steps):
            with display.paused("validation"):
                validated = validation(vla, autocast=autocast, stopped=lambda: stop.agreed(ranks) is not None)
        if metrics.is_finite():
            display.step(metrics, validated)
        best = is_best(job.run, validated, ranks)
        stopped = stop.agreed(ranks)
        given_up = progress.bad_steps >= cfg.max_bad_steps
        if progress.step % cfg.save_steps == 0 or progress.step == cfg.max_steps or stopped or given_up or best:
            with display.paused("saving"):
                save(job)
                display.draw_curves()
        if best:
            ranks.on_first(partial(job.run.mark_best, progress.step, validated[BEST_BY]))
        if given_up:
            raise ConfigError(
                f"{progress.bad_steps} steps in a row had a loss or gradient that is not finite: {job.run.path / SKIPPED} names their frames; "
                "give a lower --learning_rate or a --max_grad_norm, and a --run_id_note"
            )
        if stopped:
            display.say(f"saved step {progress.step}: the same command goes on from there")
            raise KeyboardInterrupt if stopped == signal.SIGINT else Terminated


def open_stream(job: Job) -> Iterator[Batch]:
    """This rank's batches from the first step on: each pass of all ranks together is what one process would draw."""
    cfg, ranks = job.cfg, job.ranks
    augmentations = cfg.augment_order if cfg.image_aug else ()
    examples = Examples(job.mixture, job.processor, augmentations=augmentations, seed=cfg.seed)
    first = job.progress.step * job.passes
    draws = DrawBatches(batch_size=job.batch_size, first=first, rank=ranks.rank, world_size=ranks.size)
    return batches(examples, draws, num_workers=cfg.num_workers, pin_memory=ranks.device != "cpu")


def set_learning_rate(job: Job) -> None:
    cfg = job.cfg
    job.progress.learning_rate = learning_rate(
        job.progress.step,
        peak=cfg.learning_rate,
        schedule=cfg.lr_schedule,
        warmup_steps=cfg.warmup_steps,
        max_steps=cfg.max_steps,
    )
    for group in job.optimizer.param_groups:
        group["lr"] = job.progress.learning_rate


def report_skipped(job: Job, metrics: Metrics) -> None:
    """Say which frames were in a step whose loss or gradient is not finite."""
    progress = job.progress
    progress.bad_steps += 1
    draws = range(progress.draws - progress.effective_batch, progress.draws)
    origins = [job.mixture.origin(draw) for draw in draws]
    frames = ", ".join(f"{dataset} episode {episode} frame {frame}" for dataset, episode, frame in origins)
    numbers = f"loss {metrics.loss}, gradient norm {metrics.grad_norm}"
    if job.ranks.is_first:
        tqdm.write(f"step {progress.step} skipped: {numbers}; its batch: {frames}", file=sys.stderr)
        job.run.log({"step": progress.step, "reason": numbers, "frames": origins}, SKIPPED)


def check(cfg: FinetuneConfig, ranks: Ranks) -> None:
    """Values that can't work, before anything is opened."""
    for name in (
        "batch_size",
        "grad_accumulation_steps",
        "max_steps",
        "save_steps",
        "keep",
        "lora_rank",
        "max_bad_steps",
    ):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, not {getattr(cfg, name)}")
    for name in ("seed", "num_workers", "warmup_steps", "weight_decay", "max_grad_norm", "val_steps"):
        if getattr(cfg, name) < 0:
            raise ConfigError(f"--{name} must not be negative, it is {getattr(cfg, name)}")
    unknown = set(cfg.augment_order) - set(AUGMENTATIONS)
    if unknown:
        raise ConfigError(f"--augment_order: there is no {sorted(unknown)[0]!r}, only {', '.join(AUGMENTATIONS)}")
    if cfg.shard and cfg.use_lora:
        raise ConfigError("--shard is for --use_lora False: an adapter's base is not trained, so leave --shard out")
    if cfg.shard and ranks.size == 1:
        print("notice: --shard has nobody to share with: start it with torchrun --nproc-per-node")
    if not 0 < cfg.learning_rate < 1:
        raise ConfigError(f"--learning_rate must lie between 0 and 1, not {cfg.learning_rate}")
    if not 0 <= cfg.lora_dropout < 1:
        raise ConfigError(f"--lora_dropout must lie in [0, 1), not {cfg.lora_dropout}")
    if not 0 <= cfg.val_share < 1:
        raise ConfigError(f"--val_share must lie in [0, 1), not {cfg.val_share}")
    check_installed(cfg.log_to)
    if cfg.shuffle_buffer_size is not None:
        print("notice: --shuffle_buffer_size is no longer needed: frames are read in random order from disk")


def find_data(cfg: FinetuneConfig) -> Path:
    """The folder of data sets, downloaded if it is a hub id."""
    if cfg.data_root_dir == FinetuneConfig.data_root_dir and not Path(cfg.data_root_dir).is_dir():
        raise ConfigError(
            f"data_root_dir {cfg.data_root_dir} isn't there: put the data sets there, or give --data_root_dir"
        )
    return resolve(cfg.data_root_dir, kind="dataset")


def build_processor(cfg: FinetuneConfig, base: Path, mixture: Mixture) -> Processor:
    """What it learns with, and will act with."""
    model = VLAConfig.from_json(base / CONFIG)
    if model.num_images_in_input == 2:
        for cache in mixture.caches:
            if not cache.has_wrist:
                raise ConfigError(
                    f"{cfg.vla_path} looks at two pictures, but data set {cache.name} has no wrist_image: take another data set"
                )
    names = [cache.name for cache in mixture.caches]
    config = ProcessorConfig.for_model(
        model,
        unnorm_key=names[0] if len(names) == 1 else None,
        center_crop=cfg.image_aug and "random_resized_crop" in cfg.augment_order,
        base_model=str(base.resolve()) if Path(cfg.vla_path).is_dir() else cfg.vla_path,
        base_fingerprint=weights.fingerprint(weights.stored_tensors(base)) if cfg.use_lora else "",
    )
    statistics = mixture.statistics
    if cfg.action_statistics == "base":
        learnt = load_statistics(base)
        statistics = dict.fromkeys(names, learnt[statistics_key(learnt, None, base)])
    return Processor(config, load_tokenizer(base), statistics)


def build_model(cfg: FinetuneConfig, base: Path, resumed: Path | None, ranks: Ranks, **sizes: int) -> VLA:
    """Base with adapter, or all of a model; from the run's last checkpoint if there is one. First says what it will take of the card."""
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(ModelOptions) if f.name != "autocast"}
    return planned_model(base, resumed, ModelOptions(autocast=in_bfloat16(cfg, ranks), **values), ranks, **sizes)


def in_bfloat16(cfg: FinetuneConfig, ranks: Ranks) -> bool:
    """Whether autocast is needed: on a GPU for weights that are trained; under an adapter the base is bfloat16 itself."""
    return cfg.autocast == "bfloat16" or (cfg.autocast == "auto" and ranks.device != "cpu" and not cfg.use_lora)


def last_checkpoint(cfg: FinetuneConfig, run: RunFolder) -> Path | None:
    """The step folder to go on from."""
    if run.checkpoints() and cfg.resume == "never":
        raise ConfigError(f"{run.path} exists and --resume is never: give a --run_id_note, or delete it")
    folder = run.newest_whole()
    if folder is not None:
        print(f"going on from {folder}")
    return folder


def save(job: Job) -> None:
    """A step folder with everything that a resumed run needs, written by rank 0."""
    cfg, ranks, step = job.cfg, job.ranks, job.progress.step
    given: dict[str, Any] = {"processor": job.processor, "statistics": job.processor.statistics}
    tensors = ranks.whole(job.vla.state_dict())
    state = capture(job.progress, job.optimizer, ranks)

    def write(folder: Path) -> None:
        if cfg.use_lora:
            from prismatic.adapter import save_adapter

            save_adapter(folder, job.vla, options=dataclasses.asdict(cfg), **given)
        else:
            tokenizer = resolve(cfg.vla_path)
            save_checkpoint(folder, job.vla, tensors=tensors, tokenizer_from=tokenizer, dtype=torch.float32, **given)

    ranks.on_first(lambda: job.run.save(step, write, state))


def run_name(cfg: FinetuneConfig) -> str:
    """OpenVLA's run id: model, data, effective batch, learning rate, adapter, note."""
    base = Path(cfg.vla_path)
    base = base.parent if STEP_FOLDER.fullmatch(base.name) else base
    name = f"{base.name}+{cfg.dataset_name.replace(',', '_').replace(':', '-')}"
    name += f"+b{cfg.batch_size * cfg.grad_accumulation_steps}+lr-{cfg.learning_rate:g}"
    if cfg.use_lora:
        name += f"+lora-r{cfg.lora_rank}+dropout-{cfg.lora_dropout:g}"
    if cfg.run_id_note:
        name += f"--{cfg.run_id_note}"
    return name + "--image_aug" * cfg.image_aug


if __name__ == "__main__":
    with exit_codes():
        main(tyro.cli(FinetuneConfig, config=(tyro.conf.FlagConversionOff,), use_underscores=True, description=__doc__))
