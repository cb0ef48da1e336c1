"""Evaluate a policy in LIBERO: success rate with interval, videos, report.html.

    python eval.py --pretrained_checkpoint FOLDER --task_suite_name libero_spatial --num_trials_per_task 50

Writes rollouts/EVAL-<suite>-<checkpoint>/. The same command continues where it was stopped; more trials or tasks are
added to what is there. Without a GPU the policy computes on one thread, unless OMP_NUM_THREADS says otherwise.
`torchrun --nproc-per-node N eval.py …` shares the episodes among N GPUs.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from config import EvalConfig
from prismatic import evaluation, foreign_flags, report
from prismatic.episodes import setup
from prismatic.episodes.player import Play
from prismatic.episodes.result import Facts
from prismatic.episodes.trials import list_trials
from prismatic.errors import exit_codes
from prismatic.evaluation import RolloutFolder
from prismatic.pages import comparison
from prismatic.ranges import checked, command_line
from prismatic.scene.renderer import choose_renderer, render_options
from prismatic.scene.suites import Benchmark, Libero
from prismatic.summary import mean_over_suites, result
from prismatic.versions import check_simulator, unpinned_simulator, versions

# Nothing here may import torch at the top: each simulator process imports this file once more.

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun


def main(cfg: EvalConfig, benchmark: Benchmark | None = None) -> None:
    cfg, benchmark = checked(cfg), benchmark or Libero()
    if cfg.compare or cfg.mean_of:
        pairs = comparison.compare_folders(cfg.compare, margin=cfg.margin, difference=cfg.difference)
        print(*(pairs if cfg.compare else mean_over_suites(cfg.mean_of)), sep="\n")
        return
    check_simulator(allow_unpinned=cfg.allow_unpinned_simulator)
    setup.check(vars(cfg))
    trials = plan(cfg, benchmark)
    facts = identity(cfg, benchmark, choose_renderer(setup.LOCAL_RANK))
    path = cfg.local_log_dir / setup.run_name(vars(cfg))
    with (
        RolloutFolder(path, identity=facts, record=record(cfg), rank=RANK) as folder,
        evaluation.at_the_end(lambda: report.update(folder)),
    ):
        if cfg.open_loop:  # the control that plays nothing; its result stands in the run's record, beside its score
            from prismatic.episodes.open_loop import open_loop

            policy, cache = setup.load_policy(vars(cfg)).policy, open_data(cfg)
            folder.note(open_loop=open_loop(policy, cache, frames=cfg.open_loop_frames, val_share=cfg.val_share))
        summary = evaluation.evaluate(
            trials,
            folder,
            play=play_options(cfg, path, benchmark),
            load_policy=(lambda: setup.load_policy(vars(cfg))) if cfg.policy == "checkpoint" else None,
            num_workers=setup.workers_that_fit if cfg.num_workers == "auto" else cfg.num_workers,
            one_by_one=cfg.deterministic,
            retry_errors=cfg.retry_errors,
            ranks=RANKS,
            show=RANK == 0,
        )
    ended = {row.episode_id for row in evaluation.read_rows(path)}
    if RANKS == 1 or ended >= {trial.id for trial in trials}:  # of several ranks, the last one has the whole result
        print(*result(path, summary), sep="\n")
        if trials and not summary["successes"] + summary["failures"]:
            sys.exit(f"error: none of the {len(trials)} episodes ended with an outcome, see {path}")


def plan(cfg: EvalConfig, benchmark: Benchmark) -> list[Any]:
    """What is to be played, of all ranks together."""
    if cfg.open_loop:
        return []
    suite, tasks, count = cfg.task_suite_name, cfg.task_ids, cfg.num_trials_per_task
    if cfg.policy != "replay":
        where = {"first_init_state": cfg.first_init_state, "env_seed": cfg.env_seed}
        return list_trials(benchmark, suite, task_ids=tasks, num_trials=count, **where)
    from prismatic.episodes.recorded import recorded_episodes

    found, sentence = recorded_episodes(open_data(cfg), suite, task_ids=tasks, limit=count, from_hdf5=cfg.from_hdf5)
    if RANK == 0:
        print(sentence)
    return found


def open_data(cfg: EvalConfig) -> Any:
    """The frame cache of the data set that is replayed or asked about."""
    from prismatic.data.mixture import open_cache

    how = {"data_keys": cfg.data_keys, "gripper": cfg.gripper, "rotate_images": cfg.rotate_images}
    return open_cache(cfg.data_root_dir, cfg.dataset_name, cache_dir=cfg.cache_dir, **how)


def play_options(cfg: EvalConfig, path: Path, benchmark: Benchmark) -> Play:
    return Play(
        policy="parent" if cfg.policy == "checkpoint" else cfg.policy,
        num_open_loop_steps=cfg.num_open_loop_steps,
        settle=cfg.num_steps_wait,
        seed=cfg.seed,
        quality=cfg.render_quality,
        instruction=cfg.instruction,
        video_folder=path if cfg.save_videos else None,
        video_every=cfg.video_every,
        annotate=cfg.annotate_videos,
        benchmark=benchmark,
    )


def identity(cfg: EvalConfig, benchmark: Benchmark, renderer: str) -> Facts:
    dataset = open_data(cfg).fingerprint if cfg.policy == "replay" else None
    return setup.identity(vars(cfg), vars(EvalConfig()), benchmark, renderer=renderer, dataset=dataset)


def record(cfg: EvalConfig) -> Facts:
    """What should be known beside the numbers."""
    adapter = str(cfg.lora_checkpoint or "") or None
    paths = {"checkpoint_path": cfg.pretrained_checkpoint, "adapter_path": adapter}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "num_workers": cfg.num_workers,
        "ranks": RANKS,
        **(paths if cfg.policy == "checkpoint" else {}),
        "difference_asked": cfg.difference,
        "render_options": render_options(cfg.render_quality),
        "unpinned_simulator": unpinned_simulator(),
        "versions": versions(),
    }


def parse(arguments: list[str]) -> EvalConfig:
    """A command line, OpenVLA's and OpenVLA-OFT's own flags included."""
    return command_line(EvalConfig, __doc__, foreign_flags.translate(arguments, foreign_flags.EVALUATE))


if __name__ == "__main__":
    with exit_codes():
        main(parse(sys.argv[1:]))
