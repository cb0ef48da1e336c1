"""Trials in; a folder of results.jsonl, summary.json, run.json and videos out.

results.jsonl is the truth: a line an episode, safe on disk as it ends, so the same call continues where it
stopped; summary.json is derived. Errors (crashed or hung simulators) are no failures: their `success` is null
and no rate counts them. A run that differs in what the numbers depend on (run.json) is refused the folder.
"""

import contextlib
import fcntl
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from prismatic.atomic import append_line, lock, sweep, write_json, writing_to
from prismatic.episodes import pool
from prismatic.episodes.player import Outcome, Play
from prismatic.episodes.result import ACTIONS, KNOWN_LATER, EpisodeResult, Facts, Run, read_rows, read_run, save_actions
from prismatic.episodes.session import Session
from prismatic.episodes.trials import Trial, TrialQueue
from prismatic.errors import ConfigError
from prismatic.filenames import REPORT, RESULTS, RUN, SUMMARY, UNFINISHED, VERSIONS
from prismatic.records import is_whole, read_object
from prismatic.summary import beside, summarise

POSTERS = "posters"  # folder of the videos' last frames
TASK_CHARACTERS = 50  # of the instruction in a video's name, as OpenVLA has it


class RolloutFolder:
    """A run's folder, held by this process (one process a rank) until the end of its `with`.

    identity: what the numbers depend on (JSON values); it must equal that of the run already there. record:
    what should merely be known (versions, command line, …); the latest counts. ConfigError when the folder
    cannot be written, holds another run, or is in use.
    """

    def __init__(self, path: Path, *, identity: Facts, record: Facts, rank: int = 0) -> None:
        self.path, self.rank = path, rank
        with writing_to(path, "another --local_log_dir"):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / f".lock-{rank}").open("w")
            lock(self._lock, f"another evaluation is writing to {path}: wait for it, or use another --run_id_note")
            self._is_new = rank == 0 and not (path / RUN).exists()
            with self.locked():
                self._claim(identity, record)
                _drop_torn_line(path / RESULTS)
                for folder in (path, path / ACTIONS):
                    sweep(folder, "*.*")  # files; the folders are the other ranks'
            self.unfinished = path / f"{UNFINISHED}{rank}"
            shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished.mkdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among the ranks while it lasts."""
        with (self.path / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _claim(self, identity: Facts, record: Facts) -> None:
        identity = msgspec.json.decode(msgspec.json.encode(identity))
        run, results = self.path / RUN, self.path / RESULTS
        old_run = read_run(self.path) if run.exists() else Run()
        there = old_run.identity
        goes_on = results.exists() and results.stat().st_size > 0
        for name in [*identity, *there] if goes_on else ():
            old, new = there.get(name), identity.get(name)
            if old != new and (name in there or name not in KNOWN_LATER):
                raise ConfigError(
                    f"{self.path} holds a run with {name} {old!r}, this one has {new!r}: "
                    "use another --run_id_note, or delete that folder"
                )
        if goes_on or there == identity:
            record = {**old_run.record, **record}
        write_json(run, {"identity": identity, "record": record})
        write_json(self.path / VERSIONS, record.get("versions", {}))  # as beside an adapter

    def rows(self) -> list[EpisodeResult]:
        """The results so far, the last line of each episode, in the order in which they ended."""
        with self.locked():
            return read_rows(self.path)

    def note(self, *, session: Facts | None = None, **facts: Any) -> None:
        """Add to the record what became known only now. session: what one call measured of itself (session.py); those before it stay."""
        with self.locked():
            run = read_run(self.path)
            if session:
                facts["sessions"] = [*run.record.get("sessions", []), session]
            write_json(self.path / RUN, {"identity": run.identity, "record": {**run.record, **facts}})

    def add(self, outcome: Outcome, *, number: int) -> EpisodeResult:
        """Give the video and its poster their names, save the actions, and append the episode's line, safe on disk when this returns.

        number: the video's, unique within the folder. ConfigError when the disk is full.
        """
        row = outcome.row
        row.seconds = round(row.seconds, 2)
        if outcome.video:
            row.video = video_name(number, bool(row.success), row.instruction)
            (self.path / POSTERS).mkdir(exist_ok=True)
            for name in (poster_name(row.video), row.video):
                made = outcome.video.with_suffix(Path(name).suffix)
                if made.is_file():
                    made.replace(self.path / name)
        if outcome.actions is not None:
            row.actions = save_actions(self.path, row.episode_id, outcome.actions)
        with self.locked():
            append_line(self.path / RESULTS, msgspec.json.encode(row))
        return row

    def summarise(self) -> Facts:
        """Write summary.json from what is on disk and return it."""
        with self.locked():
            run, rows = read_run(self.path), read_rows(self.path)
            controls = beside(self.path, run.identity, task_ids={row.task_id for row in rows})
            summary = summarise(rows, protocol={**run.identity, **run.record}, controls=controls)
            write_json(self.path / SUMMARY, summary)
        return summary

    def __enter__(self) -> "RolloutFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self._lock.close()
        # it failed before anything came of it: leave no trace
        if kind and self._is_new and not (self.path / RESULTS).exists():
            for name in (RUN, SUMMARY, REPORT, VERSIONS, ".lock", f".lock-{self.rank}"):
                (self.path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else lies there
                self.path.rmdir()


def video_name(number: int, success: bool, instruction: str) -> str:
    """`episode=…--success=…--task=….mp4`, as people of the OpenVLA repository know it."""
    task = re.sub(r"[^a-z0-9_-]", "_", instruction.lower())[:TASK_CHARACTERS]
    return f"episode={number}--success={success}--task={task}.mp4"


def poster_name(video: str) -> str:
    """Where a video's poster lies, within the rollout folder."""
    return f"{POSTERS}/{video.removesuffix('.mp4')}.jpg"


@dataclass(frozen=True)
class Loaded:
    """A policy, ready to act, and how it is best asked."""

    # a Policy, whose module needs torch, which an evaluation of the expert does not; None: none is asked
    policy: Any = None
    prepare: Callable[[Any], Any] | None = None  # its image path, for the simulator processes
    counts: Mapping[str, int] | None = None  # what its decoding has done so far
    window: float = 0.0  # s for which an answer waits for more to ask, see pool.answer_at
    memory_for: Callable[[int], int] | None = None  # bytes of its device that answering so many at once takes


def evaluate(
    trials: Sequence[Trial],
    folder: RolloutFolder,
    *,
    play: Play,
    load_policy: Callable[[], Loaded] | None = None,
    num_workers: int | Callable[[Callable[[int], int] | None], int] = 1,
    one_by_one: bool = False,
    retry_errors: bool = False,
    ranks: int = 1,
    show: bool = False,
) -> Facts:
    """Play the trials that have no line yet, of those that are this rank's; returns the summary of the whole folder.

    play.video_folder is set here to the folder's own place when it is not None. load_policy is called, once, only if there is something
    to play, and num_workers (when it is a function) after it, with its memory_for, so that it sees what is left. retry_errors: play those
    again that ended as errors. show: a progress bar. However it ends, summary.json is brought up to date.
    """
    mine = {trial.id: trial for trial in trials[folder.rank :: ranks]}
    done = [row for row in folder.rows() if row.episode_id in mine and not (retry_errors and row.error)]
    played = {row.episode_id for row in done}
    pending = [trial for name, trial in mine.items() if name not in played]
    if done and show:
        print(f"{len(done)} of {len(mine)} episodes are already in {folder.path}")
    if not pending:
        return folder.summarise()
    play = replace(play, golden=True, video_folder=play.video_folder and folder.unfinished.resolve())
    loaded = load_policy() if load_policy else Loaded()
    if policy := loaded.policy:
        folder.note(policy_card=policy.metadata())
        play = replace(play, num_images=policy.num_images, uses_state=policy.uses_state, prepare=loaded.prepare)
    wanted = num_workers(loaded.memory_for) if callable(num_workers) else num_workers
    workers, window = min(max(wanted, 1), len(pending)), 0.0 if one_by_one else loaded.window
    session = Session(policy, workers=workers, rank=folder.rank, one_by_one=one_by_one, counts=loaded.counts)
    players = pool.Pool(TrialQueue(pending).next_job, play, workers, session.answer, window, on_message=session.hear)
    outcomes = Counter(row.success for row in done)

    def finish() -> None:
        if session.episodes:
            card = {"policy_card": policy.metadata()} if policy else {}  # anew: what was compiled is known only now
            folder.note(session=session.record(), **card)
        folder.summarise()

    bar = tqdm(total=len(mine), initial=len(done), unit="episode", disable=not show, dynamic_ncols=True)
    with bar, at_the_end(finish), contextlib.closing(players.run()) as ends:
        for ended in ends:
            trial: Trial = ended.job
            outcome = ended.result or Outcome(play.row(trial, seconds=ended.seconds, error=ended.error))
            session.note(outcome)
            stored = play.benchmark.num_init_states(trial.suite, trial.task_id)
            before = 0 if trial.recording else trial.task_id * stored  # as OpenVLA counts; a data set does it itself
            row = folder.add(outcome, number=before + trial.init_state + 1)
            if row.error:
                bar.write(f"error in {row.episode_id}: {row.error}")
            outcomes[row.success] += 1
            bar.set_postfix(successes=outcomes[True], errors=outcomes[None], refresh=False)
            bar.update()
    return read_object(folder.path / SUMMARY)


@contextlib.contextmanager
def at_the_end(act: Callable[[], None]) -> Iterator[None]:
    """Do it however the block ends; what broke the block is what is raised."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(ConfigError, OSError):  # what broke first says more
            act()
        raise
    act()


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last newline, a line that was being written when the machine stopped; a whole line gets its newline back."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        begin = content.rfind(b"\n") + 1
        if is_whole(content[begin:], EpisodeResult):
            append_line(path, b"")
        elif content.startswith(b"[") or content.count(b'"episode_id"', begin) > 1:
            raise ConfigError(f"{path} has several rows in its last line: give each a line, or move the file away")
        else:
            with path.open("r+b") as results:
                results.truncate(begin)
