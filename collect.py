"""Demonstrations in LIBERO's simulator → an RLDS data set laid out as modified_libero_rlds is, or a LeRobot one (--format lerobot).

    python collect.py --task_suite_name libero_spatial --task_ids 0 2 --num_demos_per_task 30   # by the scripted expert
    python collect.py --task_suite_name libero_spatial --from_hdf5 FOLDER                       # LIBERO's own, replayed

Each successful episode is first a file of its own beside the data set; the same command goes on where it stopped, and
another one of the same dataset_name adds to it. The expert starts at random, from a range of seeds of its own: never in
one of the stored states that evaluation uses.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta
from tqdm import tqdm

from config import WORKSPACE
from prismatic.atomic import lock, sweep, write_json, writing_to
from prismatic.data import lerobot_writer, rlds
from prismatic.data.staging import STAGED
from prismatic.episodes import pool
from prismatic.episodes.demonstration import Demonstration, Job, Record
from prismatic.episodes.replay import FAILED, SOURCES, Replays, find_replays
from prismatic.errors import ConfigError, exit_codes
from prismatic.hub import newest_step
from prismatic.ranges import Count, Positive, Seed, Workers, checked, command_line
from prismatic.records import read_object
from prismatic.scene.renderer import choose_renderer
from prismatic.scene.suites import instruction, num_tasks
from prismatic.versions import SIMULATOR_PACKAGES, check_simulator, folder_fingerprint, versions

ATTEMPTS_PER_DEMO = 3  # a task is given up when so many attempts for each wanted episode,
SPARE_ATTEMPTS = 10  # and so many more, were not enough
STAGE_FORMAT = 5  # is raised when episodes would come out otherwise: old and new ones must not be mixed


@dataclass(frozen=True)
class CollectConfig:
    # libero_spatial, libero_object, or of libero_goal the tasks 1 2 4 6 8: those that put one object on or in another. Any suite with from_hdf5.
    task_suite_name: str = "libero_spatial"
    # Tasks of the suite, such as `--task_ids 0 3`; none means all.
    task_ids: tuple[Count, ...] = ()
    # Folder of LIBERO's own demonstrations, <task name>_demo.hdf5, played again with LIBERO's own pixels (perturbation, render_quality and
    # seed play no part). None: the scripted expert makes new ones.
    from_hdf5: Path | None = None
    # Successful episodes wanted of each task; with from_hdf5, how many of each file are played.
    num_demos_per_task: Positive = 50
    # Format of the new data set: rlds (data_root_dir/dataset_name/1.0.0) or lerobot (v3.0, data_root_dir/dataset_name).
    format: Literal["rlds", "lerobot"] = "rlds"
    # Folder of data sets; the new one goes there.
    data_root_dir: Path = WORKSPACE / "datasets"
    # Small letters, digits and _.
    dataset_name: str = "libero_expert"
    # Simulator processes, 2 GB each.
    num_workers: Workers = 2
    # Largest random push while the expert acts, in units of a full command; 0 for none. Its own answers are what is recorded.
    perturbation: Annotated[float, Meta(ge=0, le=2)] = 0.5
    # Checkpoint or adapter folder of a policy that acts first, for a random number of steps; the expert's answers are recorded all
    # the same, so the data shows the way back from that policy's own mistakes (DAgger); of a policy of chunks, whose labels are what was done next,
    # only from the expert's first own step on. None: the expert acts alone.
    policy_checkpoint: Path | None = None
    # fast: seven times faster on a CPU, pixels differ by about 2 of 255. standard: LIBERO's own pixels.
    render_quality: Literal["standard", "fast"] = "fast"
    # Another seed gives other episodes.
    seed: Seed = 0
    # Collect although mujoco or robosuite is another version than scores are made with.
    allow_unpinned_simulator: bool = False


class Schedule:
    """Which attempts are still to be made. Which are made in the end depends on outcomes alone, never on timing."""

    actor = "expert"

    def __init__(self, cfg: CollectConfig, stage: Path) -> None:
        self._cfg, self._stage = cfg, stage
        acting = cfg.policy_checkpoint and folder_fingerprint(newest_step(cfg.policy_checkpoint), weights_only=True)
        self._after = f"after-{acting[:6]}-" if acting else ""
        self._limit = cfg.num_demos_per_task * ATTEMPTS_PER_DEMO + SPARE_ATTEMPTS
        self.tasks = list(dict.fromkeys(cfg.task_ids)) or list(range(num_tasks(cfg.task_suite_name)))
        self.total = len(self.tasks) * cfg.num_demos_per_task  # episodes wanted
        self._job = functools.partial(
            Demonstration,
            suite=cfg.task_suite_name,
            quality=cfg.render_quality,
            seed=cfg.seed,
            perturbation=cfg.perturbation,
            policy=str(cfg.policy_checkpoint or ""),
        )
        # of each task: attempts so far, and of them
        self._next, self._running, self.successes, self.failures = (Counter[int]() for _ in range(4))

    def found(self) -> int:
        """How many of the wanted episodes earlier calls have left."""
        left = [len(list(self._stage.glob(f"{self._stem(task_id)}[0-9]*.npz"))) for task_id in self.tasks]
        return sum(min(count, self._cfg.num_demos_per_task) for count in left)

    def _stem(self, task_id: int) -> str:
        return f"task{task_id:02d}-{self._after}"  # episodes that a policy begins lie beside the expert's

    def next_job(self, scene: Hashable = None) -> Demonstration | None:
        """The next attempt that is needed, task after task; None while those under way may be enough."""
        cfg = self._cfg
        for task_id in self.tasks:
            while self.successes[task_id] + self._running[task_id] < cfg.num_demos_per_task:
                attempt = self._next[task_id]
                if attempt >= self._limit:
                    raise ConfigError(
                        f"the expert solved task {task_id} of {cfg.task_suite_name} {self.successes[task_id]} times in {attempt} "
                        "attempts: leave it out of task_ids, or lower num_demos_per_task or perturbation"
                    )
                self._next[task_id] += 1
                path = self._stage / f"{self._stem(task_id)}{attempt:05d}.npz"
                if path.is_file():  # an earlier call's
                    self.successes[task_id] += 1
                elif path.with_suffix(FAILED).is_file():
                    self.failures[task_id] += 1
                else:
                    self._running[task_id] += 1
                    return self._job(task_id=task_id, path=path, attempt=attempt)
        return None

    def finished(self, job: Job, *, success: bool) -> int:
        """Take note of an outcome; how many episodes nearer to the end that is."""
        self._running[job.task_id] -= 1
        (self.successes if success else self.failures)[job.task_id] += 1
        return int(success)

    def report(self) -> list[str]:
        """Sentences about the expert's failures."""
        return [
            f"task {task_id}: the expert failed in {self.failures[task_id]} of {self.successes[task_id] + self.failures[task_id]} attempts"
            for task_id in self.tasks
            if self.failures[task_id]
        ]


def stage_folder(cfg: CollectConfig) -> Path:
    """Where finished episodes go, a file each."""
    return cfg.data_root_dir / (cfg.dataset_name + STAGED)


def open_stage(cfg: CollectConfig) -> Path:
    """The folder of finished episodes; ConfigError where it holds another collection's."""
    stage = stage_folder(cfg)
    source = cfg.from_hdf5 and str(cfg.from_hdf5.resolve())
    settings = {"format": STAGE_FORMAT, "from_hdf5": source}
    settings |= {"task_suite_name": cfg.task_suite_name, "dataset_format": cfg.format}
    settings |= {name: versions()[name] for name in SIMULATOR_PACKAGES}
    if not source:
        settings |= {name: getattr(cfg, name) for name in ("seed", "perturbation", "render_quality")}
    note = stage / "settings.json"
    if not note.is_file():
        if (made := cfg.data_root_dir / cfg.dataset_name).exists():
            raise ConfigError(
                f"{made} is there, and {stage.name} with its episodes isn't: give another dataset_name, or delete it"
            )
        with writing_to(stage):
            stage.mkdir(parents=True, exist_ok=True)
        write_json(note, settings)
    before = read_object(note)
    for name, value in settings.items():
        same = before.get(name, value) == value
        if name == "from_hdf5" and (stage / SOURCES).is_file():
            # its files may lie elsewhere now: Replays.compare looks at what is in them
            same = bool(before.get(name)) == bool(value)
        if not same:
            raise ConfigError(
                f"{stage} was collected with {name} {before.get(name)}, not {value}: "
                "give the same, another dataset_name, or delete that folder and the data set beside it"
            )
    return stage


@contextlib.contextmanager
def alone(stage: Path) -> Iterator[None]:
    """Keep others out of the folder, and sweep what a killed call left unfinished there. ConfigError while another call writes to it."""
    with (stage / "settings.json").open() as held:
        lock(held, f"another collect.py writes to {stage}: wait for it, or give another dataset_name")
        sweep(stage)
        yield


def run(schedule: Schedule | Replays, work: Record, bar: tqdm, *, num_workers: int) -> None:
    """Give out jobs and gather what comes of them until there are none left. A failure leaves an empty file: no later call repeats it."""
    succeeded = tried = 0
    with contextlib.closing(pool.Pool(schedule.next_job, work, num_workers).run()) as ends:
        for ended in ends:
            job = ended.job
            if ended.error:
                raise ConfigError(
                    f"task {job.task_id} broke {pool.ATTEMPTS} times ({ended.error}), perhaps for want of memory (a simulator "
                    "process needs 2 GB): give the same command again with a smaller num_workers"
                )
            if not ended.result:
                with writing_to(job.path.parent):
                    job.path.with_suffix(FAILED).touch()
            tried += 1
            succeeded += ended.result > 0
            bar.set_postfix_str(f"{schedule.actor} {succeeded} of {tried}, task {job.task_id}", refresh=False)
            bar.update(schedule.finished(job, success=ended.result > 0))


def collect(cfg: CollectConfig) -> Path:
    """Episodes as files, then the data set made of them; its version folder."""
    choose_renderer()
    check_simulator(allow_unpinned=cfg.allow_unpinned_simulator)
    rlds.check_name(cfg.dataset_name)
    if cfg.policy_checkpoint and cfg.from_hdf5:
        raise ConfigError("policy_checkpoint acts before the expert, and from_hdf5 has none: leave one of them out")
    if cfg.policy_checkpoint and not cfg.policy_checkpoint.is_dir():
        raise ConfigError(f"policy_checkpoint {cfg.policy_checkpoint} isn't there: give a checkpoint or adapter folder")
    suite, stage = cfg.task_suite_name, stage_folder(cfg)
    task_ids = cfg.task_ids or range(num_tasks(suite))
    for task_id in task_ids:
        instruction(suite, task_id)  # a ConfigError for a task that isn't there
    if cfg.from_hdf5:
        schedule = Replays(find_replays(cfg.from_hdf5, suite, task_ids, stage=stage, limit=cfg.num_demos_per_task))
        open_stage(cfg)
    else:
        schedule = Schedule(cfg, open_stage(cfg))
    with alone(stage):
        if isinstance(schedule, Replays):
            schedule.compare(stage)
        found, work = schedule.found(), Record(str(cfg.policy_checkpoint or ""))
        with tqdm(total=schedule.total, initial=found, unit="episode", desc=suite) as bar:
            run(schedule, work, bar, num_workers=min(cfg.num_workers, schedule.total - found))
        for line in schedule.report():
            print(line)
        writer = rlds if cfg.format == "rlds" else lerobot_writer
        return writer.write_dataset(stage, cfg.data_root_dir, cfg.dataset_name)


if __name__ == "__main__":
    with exit_codes():
        print(f"data set: {collect(checked(command_line(CollectConfig, __doc__)))}")
