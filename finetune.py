"""Fine-tune an OpenVLA policy on demonstrations: a LoRA adapter, or with --use_lora False all of a small model.

    python finetune.py --vla_path openvla/openvla-7b --data_root_dir datasets --dataset_name libero_spatial_no_noops
    python finetune.py … --action_head l1 --num_images_in_input 2 --use_proprio True      # OpenVLA-OFT

Writes <run_root_dir>/<run>/latest, which eval.py takes as --pretrained_checkpoint. Ctrl-C saves; the same command goes on from there.
Several GPUs: torchrun --nproc-per-node N finetune.py … OpenVLA's and OpenVLA-OFT's own flags are taken too.
"""

import dataclasses
import itertools
import math
import sys
from functools import partial
from pathlib import Path

from config import MAY_CHANGE_ON_RESUME, FinetuneConfig
from prismatic import foreign_flags
from prismatic.augmentation import drawing
from prismatic.data.examples import Examples, draw_batches
from prismatic.data.loader import batches
from prismatic.errors import exit_codes
from prismatic.filenames import FIRST_BATCH, LATEST
from prismatic.models.lora_dtype import cast_once
from prismatic.ranges import check_folder_name, checked, command_line
from prismatic.training import first_batch, setup
from prismatic.training.display import Display
from prismatic.training.distributed import Ranks, joined, no_sync
from prismatic.training.loggers import open_logger
from prismatic.training.metrics import measured
from prismatic.training.model import build_training_model, plan_training
from prismatic.training.optimizer import make_optimizer
from prismatic.training.signals import StopSignal, leave
from prismatic.training.state import capture, restore, seed_torch
from prismatic.training.step import backward, clip_gradients, learning_rate
from prismatic.training.validation import BEST_BY, Validation


def main(cfg: FinetuneConfig) -> Path:
    cfg = checked(cfg)
    check_folder_name(cfg.run_name, "the run's name (--vla_path, --dataset_name, --run_id_note)")
    with joined() as ranks:
        run = prepare(cfg, ranks)
        logger = open_logger(
            cfg.log_to if ranks.is_main else "none", run.folder.path, options=dataclasses.asdict(cfg), first_step=run.progress.step
        )  # fmt: skip
        steps = {"max_steps": cfg.max_steps, "log_steps": cfg.log_steps}
        with Display(run.folder, logger, run.progress, **steps, shown=ranks.is_main) as display:
            train(cfg, run, display)
        print(f"done: {run.folder.path / LATEST} is what eval.py takes as --pretrained_checkpoint")
        return run.folder.path / LATEST


def train(cfg: FinetuneConfig, run: setup.TrainingRun, display: Display) -> None:
    """The steps. A stop signal ends them after the present one, saved."""
    ranks, progress, processor, mixture = run.ranks, run.progress, run.task.processor, run.task.mixture
    schedule = partial(
        learning_rate, peak=cfg.learning_rate, schedule=cfg.lr_schedule, max_steps=cfg.max_steps, warmup_steps=cfg.warmup_steps,
        warmup_start=cfg.warmup_start, decay_step=cfg.lr_decay_step,
    )  # fmt: skip
    augment = drawing(cfg.augment_order) if cfg.image_aug else None
    examples = Examples(mixture, processor, augment=augment, seed=cfg.seed)
    draws = draw_batches(  # each micro-batch of all ranks together is what one process would draw
        batch_size=run.micro_batch_size, first=progress.step * run.grad_accumulation_steps, rank=ranks.rank, world_size=ranks.size
    )  # fmt: skip
    stream = batches(examples, draws, num_workers=cfg.num_workers, pin_memory=ranks.device != "cpu")
    due = {"every": cfg.val_steps, "last": cfg.max_steps}
    validation = Validation(mixture, processor, batch_size=run.micro_batch_size, ranks=ranks, **due)
    measure = partial(measured, tokenizer=processor.action_tokenizer)
    model, stop, saved = ranks.parallel(run.vla), StopSignal(), progress.step
    run.vla.train()
    for step in range(progress.step, cfg.max_steps):
        micro_batches = stop.unless_stopped(lambda: list(itertools.islice(stream, run.grad_accumulation_steps)))
        if stop.agreed(ranks) or micro_batches is None:
            break
        if step == 0 and ranks.is_main:
            first_batch.draw(micro_batches, processor, run.folder.path / FIRST_BATCH)
        progress.learning_rate = schedule(step)
        for group in run.optimizer.param_groups:
            group["lr"] = progress.learning_rate
        with cast_once(run.vla):
            numbers = backward(
                model, micro_batches, measure=measure, autocast=run.autocast, no_sync=no_sync(model), mean=ranks.mean
            )
        numbers["grad_norm"] = clip_gradients(run.vla.parameters(), cfg.max_grad_norm)
        progress.step, validated = step + 1, {}
        if is_good := math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"]):
            run.optimizer.step()
        run.optimizer.zero_grad()  # validation and checkpoints have this memory too
        if is_good:
            progress.bad_steps = 0
            if validation.due(progress.step):
                with display.paused("validation"):
                    validated = validation(run.vla, autocast=run.autocast, stopped=lambda: bool(stop.agreed(ranks)))
            display.step(numbers, validated)
        else:
            progress.bad_steps += 1
            setup.report_skipped(run, numbers)
        value, given_up = validated.get(BEST_BY), progress.bad_steps >= cfg.max_bad_steps
        best = value is not None and ranks.on_main_process(partial(run.folder.is_best, value))
        if progress.step % cfg.save_steps == 0 or progress.step == cfg.max_steps or best or given_up:
            saved = save(cfg, run, display)
        if best:
            ranks.on_main_process(partial(run.folder.mark_best, progress.step, validated[BEST_BY]))
        if given_up:
            raise setup.too_many_bad_steps(run)
    if signal := stop.agreed(ranks):
        saved = save(cfg, run, display) if progress.step > saved else saved
        display.say(f"saved step {saved}: the same command goes on from there" if saved else "stopped before a step")
        leave(signal)


def save(cfg: FinetuneConfig, run: setup.TrainingRun, display: Display) -> int:
    """Make a step folder with everything that a resumed run needs, by the main process; returns the step."""
    with display.paused("saving"):
        tensors, state = run.ranks.whole(run.vla.state_dict()), capture(run.progress, run.optimizer, run.ranks)
        write = partial(setup.write_weights, run=run, tensors=tensors, options=dataclasses.asdict(cfg))
        run.ranks.on_main_process(lambda: run.folder.save(run.progress.step, write, state) and None)
        display.draw_curves()
    return run.progress.step


def prepare(cfg: FinetuneConfig, ranks: Ranks) -> setup.TrainingRun:
    """Data, model and optimizer, as the run's last checkpoint left them if there is one."""
    seed_torch(cfg.seed)  # the same on all ranks, which have to draw the same adapter
    options = options_of(cfg)
    task = setup.open_task(options, ranks)
    folder, resumed, state = setup.open_run(
        cfg.run_root_dir / cfg.run_name, dataclasses.asdict(cfg) | task.identity, ranks,
        keep=cfg.keep, resume=cfg.resume, may_change=MAY_CHANGE_ON_RESUME,
    )  # fmt: skip
    progress, sizes = setup.divide(
        state, ranks, batch_size=cfg.batch_size, grad_accumulation_steps=cfg.grad_accumulation_steps
    )
    plan = partial(plan_training, task.config, options, ranks, sizes=sizes, tokens=task.longest_row)
    checkpointing = ranks.on_main_process(plan)
    vla = build_training_model(task.base, resumed, task.config, options, checkpointing=checkpointing, ranks=ranks)
    trained = [parameter for parameter in vla.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(cfg.optimizer, trained, learning_rate=cfg.learning_rate, weight_decay=cfg.weight_decay)
    if state:
        progress = restore(state, optimizer, ranks, seed=cfg.seed)
    elif not ranks.is_main:
        seed_torch(cfg.seed, rank=ranks.rank)  # from here on each has its own: dropout must differ
    run = setup.TrainingRun(ranks, task, folder, vla, optimizer, progress, *sizes, autocast=options.in_bfloat16(ranks))
    print(f"{run.describe()}; steps {progress.step} to {cfg.max_steps}")
    return run


def options_of(cfg: FinetuneConfig) -> setup.RunOptions:
    """The flags that the package asks for, by name."""
    names = [field.name for field in dataclasses.fields(setup.RunOptions)]
    return setup.RunOptions(**{name: getattr(cfg, name) for name in names})


if __name__ == "__main__":
    with exit_codes():
        own = foreign_flags.translate(sys.argv[1:], foreign_flags.FINETUNE)
        main(command_line(FinetuneConfig, __doc__, own))
