"""collect.py: which attempts are made, what is kept, how it ends. What the script makes in the real simulator: test_end_to_end.py."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from collect import ATTEMPTS_PER_DEMO, SPARE_ATTEMPTS, CollectConfig, Schedule, alone, collect, open_stage, run
from prismatic.data.lerobot_writer import LIBERO_RATE
from prismatic.data.mixture import open_cache
from prismatic.data.staging import load_episode, stage_episode
from prismatic.episodes import pool
from prismatic.episodes.demonstration import Record
from prismatic.episodes.replay import SOURCES
from prismatic.errors import ConfigError
from prismatic.versions import versions
from tests.drawn_episodes import drawn_episode

ROOT = Path(__file__).resolve().parents[1]


def config(folder: Path, **options: object) -> CollectConfig:
    return CollectConfig(**{"data_root_dir": folder, "dataset_name": "demo"} | options)  # type: ignore[arg-type]


def pretend(cfg: CollectConfig, *, workers: int, seed: int) -> set[str]:
    """Run a schedule with made-up outcomes that depend on the attempt, finishing in a random order."""
    stage = open_stage(cfg)
    schedule, order, running = Schedule(cfg, stage), random.Random(seed), []
    while True:
        while len(running) < workers and (job := schedule.next_job()):
            running.append(job)
        if not running:
            break
        job = running.pop(order.randrange(len(running)))
        success = (job.task_id + job.attempt) % 3 != 0
        job.path.with_suffix(".npz" if success else ".failed").touch()
        schedule.finished(job, success=success)
    return {path.name for path in stage.iterdir() if path.suffix != ".json"}


def test_what_is_attempted_does_not_depend_on_timing(tmp_path: Path) -> None:
    made = [
        pretend(config(tmp_path / str(seed), task_ids=(0, 4), num_demos_per_task=5), workers=workers, seed=seed)
        for seed, workers in enumerate((1, 2, 7))
    ]
    assert made[0] == made[1] == made[2]
    assert sum(name.endswith(".npz") for name in made[0]) == 10


def test_a_run_s_folder_stands_for_its_newest_policy_and_one_without_weights_for_none(tmp_path: Path) -> None:
    names = []
    for name, weights in (("a", b"one"), ("b", b"two")):
        (tmp_path / name / "latest").mkdir(parents=True)
        (tmp_path / name / "latest" / "adapter_model.safetensors").write_bytes(weights)
        jobs = [
            Schedule(config(tmp_path, policy_checkpoint=folder), tmp_path).next_job()
            for folder in (tmp_path / name, tmp_path / name / "latest")
        ]
        names += [job.path.name for job in jobs if job]
    assert names[0] == names[1] != names[2] == names[3]
    with pytest.raises(ConfigError, match="holds no weights"):
        Schedule(config(tmp_path, policy_checkpoint=tmp_path), tmp_path)


def test_a_task_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    assert Schedule(config(tmp_path, task_ids=(0, 0), num_demos_per_task=2), tmp_path).total == 2


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    few = pretend(config(tmp_path, task_ids=(1,), num_demos_per_task=2), workers=2, seed=0)
    schedule = Schedule(config(tmp_path, task_ids=(1,), num_demos_per_task=4), tmp_path / "demo_staged")
    assert schedule.found() == 2
    job = schedule.next_job()
    assert job and f"{job.path.stem}.npz" not in few and f"{job.path.stem}.failed" not in few


def test_a_hopeless_task_is_named(tmp_path: Path) -> None:
    schedule = Schedule(config(tmp_path, task_ids=(3,), num_demos_per_task=2), open_stage(config(tmp_path)))
    for _ in range(2 * ATTEMPTS_PER_DEMO + SPARE_ATTEMPTS):
        job = schedule.next_job()
        assert job
        schedule.finished(job, success=False)
    with pytest.raises(ConfigError, match=r"task 3 of libero_spatial 0 times in 16 attempts"):
        schedule.next_job()


def test_two_collections_are_not_mixed(tmp_path: Path) -> None:
    open_stage(config(tmp_path))
    open_stage(config(tmp_path, num_demos_per_task=7, task_ids=(2,)))  # more of the same is welcome
    with pytest.raises(ConfigError, match=r"perturbation 0.5, not 0.1"):
        open_stage(config(tmp_path, perturbation=0.1))
    with pytest.raises(ConfigError, match=r"dataset_format rlds, not lerobot"):
        open_stage(config(tmp_path, format="lerobot"))
    for seed in (0, 3):  # which means nothing to a replay
        open_stage(config(tmp_path, dataset_name="replayed", from_hdf5=tmp_path, seed=seed))
    with pytest.raises(ConfigError, match=f"collected with from_hdf5 {tmp_path}, not {tmp_path}/moved"):
        open_stage(config(tmp_path, dataset_name="replayed", from_hdf5=tmp_path / "moved"))
    (tmp_path / "replayed_staged" / SOURCES).write_text("{}")  # where it is known what is in the files, that decides
    open_stage(config(tmp_path, dataset_name="replayed", from_hdf5=tmp_path / "moved"))
    with pytest.raises(ConfigError, match=f"collected with from_hdf5 {tmp_path}, not None"):
        open_stage(config(tmp_path, dataset_name="replayed"))


def test_another_simulator_is_refused_and_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_stage(config(tmp_path))
    other = versions() | {"mujoco": "3.17.0"}
    for place in ("collect.versions", "prismatic.versions.versions"):
        monkeypatch.setattr(place, lambda: other)
    with pytest.raises(ConfigError, match=r"mujoco 3\.17\.0, pinned .*--allow_unpinned_simulator"):
        collect(config(tmp_path))
    with pytest.raises(ConfigError, match=r"collected with mujoco .*, not 3\.17\.0"):
        open_stage(config(tmp_path, allow_unpinned_simulator=True))


def command(folder: Path, *options: str) -> list[str]:
    places = ["--data_root_dir", str(folder), "--dataset_name", "demo", "--num_workers", "1"]
    return [sys.executable, "collect.py", *places, *options]


def test_format_lerobot_writes_what_was_staged(tmp_path: Path) -> None:
    """All wanted episodes are there already, so that no simulator starts."""
    cfg = config(tmp_path, task_ids=(0, 1), num_demos_per_task=2, format="lerobot")
    paths = [open_stage(cfg) / f"task{task:02d}-{attempt:05d}.npz" for task in (0, 1) for attempt in (0, 2)]
    for number, path in enumerate(paths):
        stage_episode(path, **drawn_episode(number))
    assert collect(cfg) == tmp_path / "demo"
    cache = open_cache(tmp_path, "demo", cache_dir=tmp_path / "cache")
    episodes = [*map(load_episode, paths)]
    assert [cache.image_bytes(frame) for frame in range(len(cache))] == [
        *itertools.chain(*(e.images for e in episodes))
    ]
    assert (cache.fps, cache.gripper.convention) == (LIBERO_RATE, "minus_one_open")


def test_ctrl_c_ends_everything_with_130(tmp_path: Path) -> None:
    many = command(tmp_path, "--task_ids", "0", "--num_demos_per_task", "9")
    running = subprocess.Popen(many, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    time.sleep(6)  # its process is building a simulator
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # soon nobody is left
            os.killpg(running.pid, 0)
            time.sleep(0.1)
    assert not list((tmp_path / "demo_staged").glob(".unfinished*"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"task_suite_name": "libero_spatal"}, "unknown task suite 'libero_spatal'"),
        ({"task_ids": (12,)}, "has no task 12"),
        ({"dataset_name": "Task-0"}, "'Task-0' can't name a data set"),
        ({"policy_checkpoint": Path("nowhere")}, "nowhere isn't there"),
        ({"policy_checkpoint": Path("nowhere"), "from_hdf5": Path("there")}, "leave one of them out"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        collect(config(tmp_path, **options))
    assert not list(tmp_path.iterdir())


def test_a_task_without_an_expert_ends_with_exit_code_2(tmp_path: Path) -> None:
    options = ("--task_suite_name", "libero_goal", "--task_ids", "0")
    done = subprocess.run(command(tmp_path, *options), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no scripted expert for task 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failure_is_marked_and_a_task_that_broke_three_times_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(config(tmp_path, task_ids=(0,), num_demos_per_task=2), open_stage(config(tmp_path)))

    def ends(self: pool.Pool) -> Iterator[pool.Ended]:
        for steps, error in ((40, None), (0, None), (None, "the simulator hung")):
            yield pool.Ended(schedule.next_job(), steps, error, 1.0)

    monkeypatch.setattr(pool.Pool, "run", ends)
    with (
        tqdm(disable=True) as bar,
        pytest.raises(ConfigError, match=r"task 0 broke 3 times \(the simulator hung.*num_work"),
    ):
        run(schedule, Record(), bar, num_workers=1)
    assert schedule.report() == ["task 0: the expert failed in 1 of 2 attempts"]
    assert [path.name for path in (tmp_path / "demo_staged").glob("task*")] == ["task00-00001.failed"]


def test_one_call_at_a_time_and_what_a_killed_one_left_is_swept(tmp_path: Path) -> None:
    stage = open_stage(config(tmp_path))
    (stage / ".unfinished-killed").mkdir()
    (stage / ".unfinished-killed" / "images.npz").touch()
    with alone(stage):
        assert [path.name for path in stage.iterdir()] == ["settings.json"]
        with pytest.raises(ConfigError, match=r"another collect\.py writes to"), alone(stage):
            pass
    with alone(stage):
        pass  # free again
