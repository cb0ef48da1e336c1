"""Fine-tune an OpenVLA policy on RLDS demonstrations: a LoRA adapter, or with --use_lora False all of a small model.

    python finetune.py --vla_path openvla/openvla-7b --data_root_dir datasets --dataset_name libero_spatial_no_noops

Writes <run_root_dir>/<run>/latest, which eval.py takes as --pretrained_checkpoint. Ctrl-C saves; the same command goes on from there.
"""

import dataclasses
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

from config import FinetuneConfig
from prismatic.checkpoint import load_tokenizer, load_vla, save_checkpoint
from prismatic.data.examples import Examples, batches
from prismatic.data.frames import DrawBatches, Mixture
from prismatic.data.mixture import open_mixture
from prismatic.errors import ConfigError, Terminated, exit_codes
from prismatic.hub import resolve
from prismatic.image import AUGMENTATIONS
from prismatic.models import weights
from prismatic.models.vla import VLA, VLAConfig
from prismatic.processor import Batch, Processor, ProcessorConfig
from prismatic.run_folder import STEP_FOLDER, RunFolder
from prismatic.training import Metrics, StopSignal, backward, learning_rate

LOG_STEPS = 10  # steps between lines of metrics.jsonl
MAY_CHANGE = (
    "max_steps",
    "save_steps",
    "keep",
    "num_workers",
    "resume",
    "shuffle_buffer_size",
    "run_root_dir",
    "cache_dir",
)  # on resuming


@dataclass
class Job:
    """What the loop works on."""

    cfg: FinetuneConfig
    mixture: Mixture
    processor: Processor
    run: RunFolder
    vla: VLA
    optimizer: torch.optim.Optimizer
    first_step: int  # to go on with; 0 in a new run


def main(cfg: FinetuneConfig) -> Path:
    check(cfg)
    job = prepare(cfg)
    train(job)
    return job.run.path / "latest"


def prepare(cfg: FinetuneConfig) -> Job:
    """Data, model and optimizer, as the run's last checkpoint left them if there is one."""
    seed_everything(cfg.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixture = open_mixture(find_data(cfg), cfg.dataset_name, cache_dir=cfg.cache_dir, seed=cfg.seed)
    base = resolve(cfg.vla_path)
    processor = build_processor(cfg, base, mixture)
    run = RunFolder(cfg.run_root_dir / run_name(cfg), keep=cfg.keep)
    resumed = last_checkpoint(cfg, run)
    data = {cache.name: cache.fingerprint for cache in mixture.caches}
    run.check_options(dataclasses.asdict(cfg) | {"data": data}, may_change=MAY_CHANGE)
    vla = build_model(cfg, base, resumed, device)
    trainable = [parameter for parameter in vla.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    first_step = 0
    if resumed is not None:
        first_step = restore(run.load_state(resumed), optimizer)
    else:
        run.cut_metrics(None)
    print(
        f"{run.path}: {sum(p.numel() for p in trainable):,} of {sum(p.numel() for p in vla.parameters()):,} parameters are trained"
    )
    print(f"{len(mixture):,} frames a pass over the data; steps {first_step} to {cfg.max_steps} on {device}")
    return Job(cfg, mixture, processor, run, vla, optimizer, first_step)


def train(job: Job) -> None:
    """The loop. A step is grad_accumulation_steps passes; a stop signal ends it after the present step, saved."""
    cfg, vla = job.cfg, job.vla
    stream = open_stream(job)
    on_gpu = next(vla.parameters()).is_cuda
    autocast = cfg.autocast == "bfloat16" or (cfg.autocast == "auto" and on_gpu)
    stop = StopSignal()
    started, samples = time.monotonic(), 0
    vla.train()
    bar = tqdm(
        range(job.first_step, cfg.max_steps),
        initial=job.first_step,
        total=cfg.max_steps,
        unit="step",
        desc="finetune",
        smoothing=0.05,
    )
    saved = job.first_step
    for step in bar:
        rate = set_learning_rate(cfg, job.optimizer, step)
        passes = [next(stream) for _ in range(cfg.grad_accumulation_steps)]
        metrics = backward(vla, passes, job.processor.action_tokenizer, autocast=autocast)
        if cfg.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(vla.parameters(), cfg.max_grad_norm)
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)
        samples += cfg.batch_size * cfg.grad_accumulation_steps
        report(job, bar, step, metrics, rate=rate, samples_per_second=samples / (time.monotonic() - started))
        done = step + 1
        if done % cfg.save_steps == 0 or done == cfg.max_steps or stop.received:
            save(job, done)
            saved = done
        if stop.received:
            bar.close()
            print(f"saved step {saved}: the same command goes on from there")
            raise KeyboardInterrupt if stop.received == signal.SIGINT else Terminated


def open_stream(job: Job) -> Iterator[Batch]:
    """Batches from the first step on."""
    cfg = job.cfg
    augmentations = cfg.augment_order if cfg.image_aug else ()
    examples = Examples(job.mixture, job.processor, augmentations=augmentations, seed=cfg.seed)
    draws = DrawBatches(batch_size=cfg.batch_size, first_step=job.first_step * cfg.grad_accumulation_steps)
    on_gpu = next(job.vla.parameters()).is_cuda
    return batches(examples, draws, num_workers=cfg.num_workers, pin_memory=on_gpu)


def set_learning_rate(cfg: FinetuneConfig, optimizer: torch.optim.Optimizer, step: int) -> float:
    rate = learning_rate(
        step,
        peak=cfg.learning_rate,
        schedule=cfg.lr_schedule,
        warmup_steps=cfg.warmup_steps,
        max_steps=cfg.max_steps,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def report(job: Job, bar: tqdm, step: int, metrics: Metrics, *, rate: float, samples_per_second: float) -> None:
    """Progress bar at every step, a line of metrics.jsonl at some."""
    numbers = dataclasses.asdict(metrics)
    bar.set_postfix(
        {"loss": f"{metrics.loss:.3f}", "acc": f"{metrics.action_accuracy:.3f}", "l1": f"{metrics.l1_loss:.3f}"},
        refresh=False,
    )
    if (step + 1) % LOG_STEPS == 0 or step + 1 == job.cfg.max_steps:
        row = {"step": step + 1, **numbers, "learning_rate": rate, "samples_per_second": round(samples_per_second, 3)}
        job.run.log(row)


def check(cfg: FinetuneConfig) -> None:
    """Values that can't work, before anything is opened."""
    for name in ("batch_size", "grad_accumulation_steps", "max_steps", "save_steps", "keep", "lora_rank"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, not {getattr(cfg, name)}")
    for name in ("seed", "num_workers", "warmup_steps", "weight_decay", "max_grad_norm"):
        if getattr(cfg, name) < 0:
            raise ConfigError(f"--{name} must not be negative, it is {getattr(cfg, name)}")
    unknown = set(cfg.augment_order) - set(AUGMENTATIONS)
    if unknown:
        raise ConfigError(f"--augment_order: there is no {sorted(unknown)[0]!r}, only {', '.join(AUGMENTATIONS)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("finetune.py trains in one process so far: start it with python, not torchrun")
    if not 0 < cfg.learning_rate < 1:
        raise ConfigError(f"--learning_rate must lie between 0 and 1, not {cfg.learning_rate}")
    if not 0 <= cfg.lora_dropout < 1:
        raise ConfigError(f"--lora_dropout must lie in [0, 1), not {cfg.lora_dropout}")
    if cfg.shuffle_buffer_size is not None:
        print("notice: --shuffle_buffer_size is no longer needed: frames are read in random order from disk")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def find_data(cfg: FinetuneConfig) -> Path:
    """The folder of data sets, downloaded if it is a hub id."""
    if cfg.data_root_dir == FinetuneConfig.data_root_dir and not Path(cfg.data_root_dir).is_dir():
        raise ConfigError(
            f"data_root_dir {cfg.data_root_dir} isn't there: put the data sets there, or give --data_root_dir"
        )
    return resolve(cfg.data_root_dir, kind="dataset")


def build_processor(cfg: FinetuneConfig, base: Path, mixture: Mixture) -> Processor:
    """What it learns with, and will act with."""
    model = VLAConfig.from_json(base / "config.json")
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
    return Processor(config, load_tokenizer(base), mixture.statistics)


def build_model(cfg: FinetuneConfig, base: Path, resumed: Path | None, device: str) -> VLA:
    """Base with adapter, or all of a model; from the run's last checkpoint if there is one. The adapter's weights are float32."""
    dtype = torch.bfloat16 if device == "cuda" and cfg.use_lora else torch.float32
    if not cfg.use_lora:
        return load_vla(resumed or base, dtype=dtype, device=device)
    vla = load_vla(base, resumed, dtype=dtype, device=device, adapter_dtype=torch.float32)
    if resumed is None:
        from prismatic.models.lora import add_lora

        add_lora(vla, rank=cfg.lora_rank, dropout=cfg.lora_dropout)
    for parameter in vla.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return vla


def last_checkpoint(cfg: FinetuneConfig, run: RunFolder) -> Path | None:
    """The step folder to go on from."""
    there = run.checkpoints()
    if not there:
        return None
    if cfg.resume == "never":
        raise ConfigError(f"{run.path} exists and --resume is never: give a --run_id_note, or delete it")
    print(f"going on from {there[-1]}")
    return there[-1]


def save(job: Job, step: int) -> None:
    """A step folder with everything that a resumed run needs."""
    cfg, vla = job.cfg, job.vla
    given: dict[str, Any] = {"processor": job.processor, "statistics": job.mixture.statistics}

    def write(folder: Path) -> None:
        if cfg.use_lora:
            from prismatic.adapter import save_adapter

            save_adapter(folder, vla, options=dataclasses.asdict(cfg), **given)
        else:
            save_checkpoint(folder, vla, tokenizer_from=resolve(cfg.vla_path), dtype=torch.float32, **given)

    state = {"step": step, "optimizer": job.optimizer.state_dict(), "torch_rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    job.run.save(step, write, state)


def restore(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> int:
    """Put optimizer and random numbers back; returns the step to go on with."""
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_rng"])
    if torch.cuda.is_available() and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"])
    return int(state["step"])


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
