"""Evaluate a policy in LIBERO: success rate with interval, a video of every episode, report.html.

    python eval.py --pretrained_checkpoint FOLDER --task_suite_name libero_spatial --num_trials_per_task 50

Writes rollouts/EVAL-<suite>-<checkpoint>/. The same command continues where it was stopped; more trials or tasks are
added to what is there. Without a GPU the policy computes on one thread, unless OMP_NUM_THREADS says otherwise.
`torchrun --nproc-per-node N eval.py …` shares the episodes among N GPUs.
"""

import functools
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from config import EvalConfig
from prismatic import evaluation, machine, report, simulator, suite_mean
from prismatic.episodes.player import Setup, Trial
from prismatic.errors import ConfigError, exit_codes
from prismatic.filenames import REPORT, RESULTS, STEP_FOLDER, VERSIONS
from prismatic.pages import comparison
from prismatic.ranges import checked
from prismatic.summary import crashed, sentences
from prismatic.versions import SIMULATOR_PACKAGES, SIMULATOR_PINS, folder_fingerprint, unpinned_simulator, versions

# Nothing here may import torch at the top: each simulator process imports this file once more.

# Within a training run (training/run_folder.py, which needs torch): the run's name says more.
RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
LOCAL_RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of them on this machine, which they share


def main(cfg: EvalConfig) -> None:
    cfg = checked(cfg)
    if cfg.compare:
        print(*comparison.told(cfg.compare, margin=cfg.margin, difference=cfg.difference), sep="\n")
        return
    if cfg.mean_of:
        print(*suite_mean.mean_over_suites(cfg.mean_of), sep="\n")
        return
    check(cfg)
    trials = [] if cfg.open_loop else plan(cfg)
    renderer = simulator.choose_renderer()
    with evaluation.RolloutFolder(
        cfg.local_log_dir / run_name(cfg), identity=identity(cfg, renderer), record=record(cfg), rank=RANK
    ) as folder:
        with folder.locked():
            (folder.path / VERSIONS).write_text(json.dumps(versions(), indent=2))
        try:
            if cfg.open_loop:
                ask_open_loop(cfg, folder)
            summary = evaluate(cfg, trials, folder)
        finally:
            if folder.rows():
                with folder.locked():
                    report.build(folder.path)
    ended = {row["episode_id"] for row in evaluation.read_rows(folder.path)}
    if RANKS == 1 or ended >= {trial.id for trial in trials}:  # of several ranks, the last one has the whole result
        print_result(cfg, folder.path, summary)


def plan(cfg: EvalConfig) -> list[Trial]:
    """What is to be played, of all ranks together."""
    if cfg.policy == "replay":
        from prismatic.episodes import recorded

        demos, sentence = recorded.demos(
            open_data(cfg),
            cfg.task_suite_name,
            task_ids=cfg.task_ids,
            limit=cfg.num_trials_per_task,
            from_hdf5=cfg.from_hdf5,
        )
        if RANK == 0:
            print(sentence)
        return list(demos)
    return evaluation.plan(
        cfg.task_suite_name,
        task_ids=cfg.task_ids,
        num_trials=cfg.num_trials_per_task,
        first_init_state=cfg.first_init_state,
        env_seed=cfg.env_seed,
        simulator=simulator.__name__,
    )


@functools.cache
def open_data(cfg: EvalConfig) -> Any:
    """The frame cache of the data set that is replayed or asked about."""
    from prismatic.data.mixture import open_cache

    how = {"data_keys": cfg.data_keys, "gripper": cfg.gripper, "rotate_images": cfg.rotate_images}
    return open_cache(cfg.data_root_dir, cfg.dataset_name, cache_dir=cfg.cache_dir, **how)


def ask_open_loop(cfg: EvalConfig, folder: evaluation.RolloutFolder) -> None:
    """The control that plays nothing; its result stands in the run's record, and so beside its score."""
    from prismatic.episodes.open_loop import open_loop

    policy, cache = load_policy(cfg), open_data(cfg)
    if policy.num_images > 1 and not cache.has_wrist:
        raise ConfigError(f"{cache.name} has no wrist_image, which this policy looks at: give another --dataset_name")
    folder.note(open_loop=open_loop(policy, cache, frames=cfg.open_loop_frames))


def evaluate(cfg: EvalConfig, trials: list[Any], folder: evaluation.RolloutFolder) -> evaluation.Row:
    mine = {trial.id for trial in trials[RANK::RANKS]}
    done = [row for row in folder.rows() if row["episode_id"] in mine and not (cfg.retry_errors and row["error"])]
    if done and RANK == 0:
        print(f"{len(done)} of {len(mine)} episodes are already in {folder.path}")
    counts = {
        "successes": sum(bool(row["success"]) for row in done),
        "errors": sum(bool(row["error"]) for row in done),
    }
    with tqdm(total=len(mine), initial=len(done), unit="episode", disable=RANK > 0, dynamic_ncols=True) as progress:

        def show(row: evaluation.Row) -> None:
            counts["successes"] += bool(row["success"])
            counts["errors"] += bool(row["error"])
            if row["error"]:
                progress.write(f"error in {row['episode_id']}: {row['error']}")
            progress.set_postfix(counts, refresh=False)
            progress.update()

        return evaluation.evaluate(
            trials,
            folder,
            setup=Setup(
                policy="parent" if cfg.policy == "checkpoint" else cfg.policy,
                settle=cfg.num_steps_wait,
                seed=cfg.seed,
                quality=cfg.render_quality,
                instruction=cfg.instruction,
                video_folder=folder.path if cfg.save_videos else None,
                annotate=cfg.annotate_videos,
                gifs=cfg.save_gifs,
                simulator=simulator.__name__,
            ),
            load_policy=(lambda: load_policy(cfg)) if cfg.policy == "checkpoint" else None,
            num_workers=(lambda: machine.simulators_that_fit(LOCAL_RANKS))
            if cfg.num_workers == "auto"
            else cfg.num_workers,
            one_by_one=cfg.deterministic,
            retry_errors=cfg.retry_errors,
            ranks=RANKS,
            on_row=show,
        )


def load_policy(cfg: EvalConfig) -> Any:
    import torch

    from prismatic import checkpoint

    torch.manual_seed(cfg.seed)
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        # The simulators fill the cores, and a number that followed theirs would change the last digits of actions.
        torch.set_num_threads(1)
    local_rank, device = os.environ.get("LOCAL_RANK"), None
    if local_rank and torch.cuda.is_available():
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)  # else every rank would also keep a context on the first GPU
    quantize, backend = precision(cfg)
    return checkpoint.load_policy(
        cfg.pretrained_checkpoint,
        adapter=cfg.lora_checkpoint,
        unnorm_key=cfg.unnorm_key,
        center_crop=cfg.center_crop,
        quantize=quantize,
        backend=backend,
        drafting=None if cfg.drafting == "auto" else cfg.drafting,
        device=device,
    )


def precision(cfg: EvalConfig) -> tuple[str, str | None]:
    """Precision and backend; None: the default one, or none is needed."""
    if cfg.load_in_8bit or cfg.load_in_4bit:
        return "int8" if cfg.load_in_8bit else "int4", "bitsandbytes"
    return cfg.quantize, None


def check(cfg: EvalConfig) -> None:
    """What can be said before anything is loaded. ConfigError."""
    if cfg.policy == "checkpoint" and not cfg.pretrained_checkpoint:
        raise ConfigError(
            "pretrained_checkpoint is not set: --pretrained_checkpoint FOLDER_OR_HUB_ID, or --policy expert"
        )
    if cfg.policy == "checkpoint" and cfg.lora_checkpoint and not cfg.lora_checkpoint.is_dir():
        raise ConfigError(f"lora_checkpoint {cfg.lora_checkpoint} is not a folder: --lora_checkpoint FOLDER")
    if unpinned_simulator() and not cfg.allow_unpinned_simulator:
        pins = " ".join(f"{name}=={pin}" for name, pin in SIMULATOR_PINS.items())
        raise ConfigError(
            f"scores change with the simulator's version ({'; '.join(unpinned_simulator())}): pip install {pins}, "
            "or --allow_unpinned_simulator True, and the result will say so"
        )
    if cfg.save_gifs and not cfg.save_videos:
        raise ConfigError("save_gifs needs the videos that GIFs are made from: leave out --save_videos False")
    given = [name for name in ("load_in_8bit", "load_in_4bit") if getattr(cfg, name)]
    given += [f"quantize {cfg.quantize}"] * (cfg.quantize != "none")
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other: set one of them")
    for name in ("env_seed", "seed"):
        if getattr(cfg, name) < 0:
            raise ConfigError(f"--{name} must not be negative, it is {getattr(cfg, name)}")
    if cfg.instruction != "keep" and cfg.policy != "checkpoint":
        raise ConfigError(f"--instruction {cfg.instruction}: only a checkpoint reads, --policy {cfg.policy} doesn't")
    if cfg.open_loop and cfg.policy != "checkpoint":
        raise ConfigError(f"--open_loop asks a checkpoint: leave out --policy {cfg.policy}")
    if cfg.open_loop_frames < 1:
        raise ConfigError(f"--open_loop_frames is {cfg.open_loop_frames}: it must be at least 1")
    if cfg.policy == "replay" and (cfg.env_seed or cfg.first_init_state):
        raise ConfigError(
            "--policy replay begins where each episode was recorded: leave out env_seed and first_init_state"
        )
    if cfg.num_workers != "auto" and cfg.num_workers < 1:
        raise ConfigError(f"num_workers is {cfg.num_workers}: it must be at least 1, or auto")
    if cfg.num_steps_wait < 0:
        raise ConfigError(f"num_steps_wait is {cfg.num_steps_wait}: it must be at least 0")


def run_name(cfg: EvalConfig) -> str:
    """OpenVLA's EVAL-{suite}-{…}--{note}, with the policy's name and without the date, so that a run can be
    continued.
    """
    policy = cfg.policy
    if cfg.policy == "checkpoint":
        folder = Path(cfg.lora_checkpoint or cfg.pretrained_checkpoint).resolve()
        policy = f"{folder.parent.name}-{folder.name}" if STEP_FOLDER.fullmatch(folder.name) else folder.name
        policy += "".join(f"-{word}" for word in precision(cfg) if word and word != "none")
    if cfg.policy == "replay":
        policy += f"-{cfg.dataset_name}"
    if cfg.instruction != "keep":
        policy += f"--instruction-{cfg.instruction}"
    note = f"--{cfg.run_id_note}" if cfg.run_id_note else ""
    return re.sub(r"[^\w.+=-]", "_", f"EVAL-{cfg.task_suite_name}-{policy}{note}")


def identity(cfg: EvalConfig, renderer: str) -> dict[str, Any]:
    """What the numbers depend on. Weights count by their content: a folder trained anew is another policy."""

    def weights(path: str | Path | None) -> str | None:
        if path and Path(path).exists():
            return f"{Path(path).resolve().name}, fingerprint {folder_fingerprint(Path(path))}"
        return str(path) if path else None

    known = versions()
    given = {} if cfg.instruction == "keep" else {"instruction": cfg.instruction}
    data = {}
    if cfg.policy == "replay":
        data = {"dataset": f"{cfg.dataset_name}, fingerprint {open_data(cfg).fingerprint}"}
    checkpoint = {
        "pretrained_checkpoint": weights(cfg.pretrained_checkpoint),
        "lora_checkpoint": weights(cfg.lora_checkpoint),
        "unnorm_key": cfg.unnorm_key,
        "center_crop": cfg.center_crop,
        "load_in_8bit": cfg.load_in_8bit,
        "load_in_4bit": cfg.load_in_4bit,
        "deterministic": cfg.deterministic,
    }
    if cfg.quantize != "none":  # named only then, so that runs of before it was there go on
        checkpoint["quantize"] = cfg.quantize
    return {
        "task_suite_name": cfg.task_suite_name,
        "policy": cfg.policy,
        **(checkpoint if cfg.policy == "checkpoint" else {}),
        **given,
        **data,
        "num_steps_wait": cfg.num_steps_wait,
        "step_limit": simulator.step_limit(cfg.task_suite_name),
        "env_seed": cfg.env_seed,
        "seed": cfg.seed,
        "renderer": renderer,
        "render_quality": cfg.render_quality,
        **{name: known[name] for name in SIMULATOR_PACKAGES},
    }


def record(cfg: EvalConfig) -> dict[str, Any]:
    """What should be known beside the numbers."""
    paths = {
        "checkpoint_path": cfg.pretrained_checkpoint,
        "adapter_path": str(cfg.lora_checkpoint or "") or None,
    }
    return {
        **(paths if cfg.policy == "checkpoint" else {}),
        "command": shlex.join(["python", *sys.argv]),
        "num_workers": cfg.num_workers,
        "ranks": RANKS,
        "difference_asked": cfg.difference,
        "render_options": simulator.render_options(cfg.render_quality),
        "unpinned_simulator": unpinned_simulator(),
        "versions": versions(),
    }


def print_result(cfg: EvalConfig, folder: Path, summary: evaluation.Row) -> None:
    judged = summary["successes"] + summary["failures"]
    rate = "no episode has ended with an outcome"
    if judged:
        low, high = (100 * limit for limit in summary["interval_95"])
        rate = f"{100 * summary['success_rate']:.1f} % success, 95 % interval {low:.1f} to {high:.1f} % "
        rate += f"({summary['successes']} of {judged} episodes)"
    print(f"{cfg.task_suite_name}, {folder.name}: {rate}")
    if crashes := crashed(summary):
        print(f"{crashes} more ended in an error and do not count: --retry_errors True plays them again")
    for line in sentences(summary):
        print(f"    {line}")
    for found in unpinned_simulator():
        print(f"beware: {found}: not to be compared with scores of the pinned version")
    for label, file in (("report ", REPORT), ("results", RESULTS)):
        if (folder / file).exists():  # neither is there after an open loop alone
            print(f"{label}  {folder / file}")
    for line in report.filmed(folder, evaluation.read_rows(folder)):
        print(line)


if __name__ == "__main__":
    with exit_codes():
        main(tyro.cli(EvalConfig, description=__doc__, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
