"""Trials in; a folder of results.jsonl, summary.json, run.json and videos out.

results.jsonl is the truth: a line an episode, safe on disk as it ends, so the same call continues where it
stopped; summary.json is derived. Errors (crashed or hung simulators) are no failures: their `success` is null
and no rate counts them. A run that differs in what the numbers depend on (run.json) is refused the folder.
"""

import contextlib
import fcntl
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from prismatic.atomic import append_line, write_json
from prismatic.episodes import actions, pool
from prismatic.episodes.controls import KNOWN_LATER, beside
from prismatic.episodes.player import Outcome, Play
from prismatic.episodes.result import EpisodeResult, Run, read_run
from prismatic.episodes.session import Session
from prismatic.episodes.trials import Trial, TrialQueue, video_number
from prismatic.errors import ConfigError
from prismatic.filenames import REPORT, RESULTS, RUN, SUMMARY, UNFINISHED, VERSIONS
from prismatic.records import read_lines
from prismatic.scene.diagnosis import Diagnosis
from prismatic.summary import summarise

if TYPE_CHECKING:  # it needs torch, which an evaluation of the expert does not
    from prismatic.policy import Policy

POSTERS = "posters"  # folder of the videos' last frames
TASK_CHARACTERS = 50  # of the instruction in a video's name, as OpenVLA has it

Facts = dict[str, Any]  # of run.json and summary.json: JSON values


class RolloutFolder:
    """A run's folder, held by this process (one process a rank) until `close`; use with `with`.

    identity: what the numbers depend on (JSON values); it must equal that of the run already there. record:
    what should merely be known (versions, command line, …); the latest counts. ConfigError when the folder
    cannot be written, holds another run, or is in use.
    """

    def __init__(self, path: Path, *, identity: Facts, record: Facts, rank: int = 0) -> None:
        self.path, self.rank = path, rank
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._hold()
            with self.locked():
                self._claim(identity, record)
                _drop_torn_line(path / RESULTS)
            self.unfinished = path / f"{UNFINISHED}{rank}"
            shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished.mkdir()
            self._videos = {row.video for row in self.rows()}
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"cannot write to {path} ({reason}): choose another --local_log_dir") from error

    def _hold(self) -> IO[str]:
        lock = (self.path / f".lock-{self.rank}").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another evaluation is writing to {self.path}: wait for it, or use another --run_id_note"
            ) from None
        return lock

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among the ranks while it lasts."""
        with (self.path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
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

    def note(self, **facts: Any) -> None:
        """Add to the record what became known only now, such as the policy's metadata."""
        with self.locked():
            run = read_run(self.path)
            write_json(self.path / RUN, {"identity": run.identity, "record": {**run.record, **facts}})

    def add_session(self, session: Facts) -> None:
        """Add to the record what one call measured of itself (session.py); those before it stay."""
        with self.locked():
            run = read_run(self.path)
            sessions = [*run.record.get("sessions", []), session]
            write_json(self.path / RUN, {"identity": run.identity, "record": {**run.record, "sessions": sessions}})

    def add(self, outcome: Outcome, *, instruction: str, number: int) -> EpisodeResult:
        """Give the video its name and append the episode's line, safe on disk when this returns.

        number: the video's, unique within the folder. ConfigError when the disk is full.
        """
        video = None
        if outcome.video and outcome.success is not None:
            video = self._keep_video(outcome.video, video_name(number, outcome.success, instruction))
        trial, acted = outcome.trial, outcome.actions
        error = outcome.error and outcome.error.encode(errors="replace").decode()  # a path in it may hold any byte
        left_out = outcome.replay is not None and outcome.replay.left_out
        why = "Left out: it does not begin as it was recorded." if left_out else f"The episode crashed: {error}"
        diagnosis = outcome.diagnosis or Diagnosis(reason=why)
        row = EpisodeResult(
            episode_id=trial.id,
            suite=trial.suite,
            task_id=trial.task_id,
            init_state=trial.init_state,
            env_seed=trial.env_seed,
            instruction=instruction,
            success=outcome.success,
            error=error,
            steps=outcome.steps,
            seconds=round(outcome.seconds, 2),
            video=video,
            actions_sha256=None if acted is None else hashlib.sha256(acted.tobytes()).hexdigest()[:16],
            stages=diagnosis.stages,
            verdict=diagnosis.verdict,
            reason=diagnosis.reason,
            actions=None if acted is None else actions.save(self.path, trial.id, acted),
            near_ties=outcome.near_ties,
            instruction_given=outcome.instruction_given,
            moved_by_env_seed_mm=outcome.moved_by_env_seed_mm,
            replay=outcome.replay,
        )
        with self.locked():
            append_line(self.path / RESULTS, msgspec.json.encode(row))
        return row

    def _keep_video(self, unfinished: Path, name: str) -> str | None:
        """Move it into the folder, with its poster and GIF; never over a recorded one (an episode played again has two)."""
        if not unfinished.is_file():
            return None
        base, again = name, 2
        while name in self._videos:
            name, again = base.removesuffix(".mp4") + f"--{again}.mp4", again + 1
        self._videos.add(name)
        for suffix, place in (
            (".jpg", self.path / poster_name(name)),
            (".gif", (self.path / name).with_suffix(".gif")),
        ):
            if unfinished.with_suffix(suffix).is_file():
                place.parent.mkdir(exist_ok=True)
                unfinished.with_suffix(suffix).replace(place)
        unfinished.replace(self.path / name)
        return name

    def summarise(self) -> Facts:
        """Write summary.json from what is on disk and return it."""
        with self.locked():
            run, rows = read_run(self.path), read_rows(self.path)
            controls = beside(self.path, run.identity, task_ids={row.task_id for row in rows})
            summary = summarise(rows, protocol={**run.identity, **run.record}, controls=controls)
            write_json(self.path / SUMMARY, summary)
        return summary

    def close(self) -> None:
        """Let another process have the folder."""
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> "RolloutFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close()
        if kind and not (self.path / RESULTS).exists():  # it failed before anything came of it: leave no trace
            for name in (RUN, SUMMARY, REPORT, VERSIONS, ".lock", f".lock-{self.rank}"):
                (self.path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else lies there
                self.path.rmdir()


def read_rows(folder: Path) -> list[EpisodeResult]:
    """The lines of results.jsonl, the last one of each episode; [] without the file. ConfigError if it is damaged."""
    path = folder / RESULTS
    way_out = "remove that line, its episode is played again"
    rows: dict[str, EpisodeResult] = {}
    for row in read_lines(path, EpisodeResult, way_out=way_out) if path.exists() else ():
        rows.pop(row.episode_id, None)
        rows[row.episode_id] = row
    return list(rows.values())


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

    policy: "Policy"
    prepare: Callable[[Any], Any] | None = None  # its image path, for the simulator processes
    counts: Mapping[str, int] | None = None  # what its decoding has done so far
    window: float = 0.0  # s for which an answer waits for more to ask, see pool.answer_at


def evaluate(
    trials: Sequence[Trial],
    folder: RolloutFolder,
    *,
    play: Play,
    load_policy: Callable[[], Loaded] | None = None,
    num_workers: int | Callable[[], int] = 1,
    one_by_one: bool = False,
    retry_errors: bool = False,
    ranks: int = 1,
    hang_limit: float = pool.HANG_LIMIT,
    on_row: Callable[[EpisodeResult], None] = lambda row: None,
) -> Facts:
    """Play the trials that have no line yet, of those that are this rank's; returns the summary of the whole folder.

    play.video_folder is set here to the folder's own place when it is not None. load_policy is called, once, only if there is something
    to play, and num_workers (when it is a function) after it, so that it sees the memory that is left. retry_errors: play those again
    that ended as errors. on_row: called with each new line. However it ends, summary.json is brought up to date.
    """
    done = {row.episode_id for row in folder.rows() if not (retry_errors and row.error)}
    pending = [trial for trial in trials[folder.rank :: ranks] if trial.id not in done]
    if not pending:
        return folder.summarise()
    loaded = load_policy() if load_policy else None
    if loaded:
        folder.note(policy_card=loaded.policy.metadata())
        play = replace(
            play, num_images=loaded.policy.num_images, uses_state=loaded.policy.uses_state, prepare=loaded.prepare
        )
    workers = min(max(num_workers() if callable(num_workers) else num_workers, 1), len(pending))
    session = Session(
        loaded and loaded.policy,
        workers=workers,
        rank=folder.rank,
        one_by_one=one_by_one,
        counts=loaded and loaded.counts,
    )
    ends = pool.run(
        TrialQueue(pending),
        replace(play, golden=True, video_folder=play.video_folder and folder.unfinished.resolve()),
        num_workers=workers,
        answer=session.answer,
        window=loaded.window if loaded and not one_by_one else 0.0,
        hang_limit=hang_limit,
        on_message=session.hear,
    )
    try:
        with contextlib.closing(ends):
            for ended in ends:
                outcome = ended.result or Outcome(ended.job, None, 0, ended.seconds, error=ended.error)
                session.note(outcome)
                trial = outcome.trial
                instruction = play.benchmark.instruction(trial.suite, trial.task_id)
                on_row(folder.add(outcome, instruction=instruction, number=video_number(play.benchmark, trial)))
    except BaseException:
        with contextlib.suppress(ConfigError, OSError):  # what broke first says more
            _finish(folder, session)
        raise
    return _finish(folder, session)


def _finish(folder: RolloutFolder, session: Session) -> Facts:
    if session.episodes:
        folder.add_session(session.record())
    return folder.summarise()


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last newline: a line that was being written when the machine stopped."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as results:
            results.truncate(content.rfind(b"\n") + 1)
