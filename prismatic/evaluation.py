"""Trials in; a folder of results.jsonl, summary.json, run.json and videos out.

results.jsonl is the truth: a line an episode, safe on disk as it ends, so the same call continues where it
stopped; summary.json is derived. Errors (crashed or hung simulators) are no failures: their `success` is null
and no rate counts them. A run that differs in what the numbers depend on (run.json) is refused the folder.
"""

import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from prismatic.atomic import no_room, write_json
from prismatic.episodes import traces
from prismatic.episodes.controls import beside
from prismatic.episodes.meter import Meter
from prismatic.episodes.player import Outcome, Setup, Trial
from prismatic.episodes.trials import names
from prismatic.episodes.trials import plan as plan
from prismatic.episodes.workers import SILENCE_LIMIT, play
from prismatic.errors import ConfigError
from prismatic.filenames import RESULTS, RUN, SUMMARY
from prismatic.scene.verdicts import Account
from prismatic.summary import summarise as summarise

POSTERS = "posters"  # folder of the videos' last frames
TASK_CHARACTERS = 50  # of the instruction in a video's name, as OpenVLA has it

Row = dict[str, Any]  # one line of results.jsonl


class RolloutFolder:
    """A run's folder, held by this process (one process a rank) until `close`; use with `with`.

    identity: what the numbers depend on (JSON values); it must equal that of the run already there. record:
    what should merely be known (versions, command line, …); the latest counts. ConfigError when the folder
    cannot be written, holds another run, or is in use.
    """

    def __init__(self, path: Path, *, identity: Row, record: Row, rank: int = 0) -> None:
        self.path, self.rank = path, rank
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._hold()
            with self.locked():
                self._claim(identity, record)
                _drop_torn_line(path / RESULTS)
            self.unfinished = path / f".unfinished-{rank}"
            shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished.mkdir()
            self._videos = {row["video"] for row in self.rows()}
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

    def _claim(self, identity: Row, record: Row) -> None:
        identity = json.loads(json.dumps(identity))
        run = self.path / RUN
        results = self.path / RESULTS
        old_run = json.loads(run.read_text()) if run.is_file() else {"identity": {}, "record": {}}
        if old_run["identity"] == identity:
            record = {**old_run["record"], **record}
        if results.exists() and results.stat().st_size:
            there, record = old_run["identity"], {**old_run["record"], **record}
            for name in [*identity, *there]:
                old, new = there.get(name), identity.get(name)
                if old != new:
                    raise ConfigError(
                        f"{self.path} holds a run with {name} {old!r}, this one has {new!r}: "
                        "use another --run_id_note, or delete that folder"
                    )
        write_json(run, {"identity": identity, "record": record})

    def rows(self) -> list[Row]:
        """The results so far, the last line of each episode, in the order in which they ended."""
        with self.locked():
            return read_rows(self.path)

    def note(self, **facts: Any) -> None:
        """Add to the record what became known only now, such as the policy's card."""
        with self.locked():
            run = json.loads((self.path / RUN).read_text())
            run["record"].update(facts)
            write_json(self.path / RUN, run)

    def add_session(self, session: Row) -> None:
        """Add to the record what one call measured of itself (meter.py); those before it stay."""
        with self.locked():
            run = json.loads((self.path / RUN).read_text())
            run["record"].setdefault("sessions", []).append(session)
            write_json(self.path / RUN, run)

    def add(self, outcome: Outcome, *, instruction: str, number: int) -> Row:
        """Give the video its name and append the episode's line, safe on disk when this returns.

        number: the video's, unique within the folder. ConfigError when the disk is full.
        """
        video = None
        if outcome.video and outcome.success is not None:
            video = self._keep_video(outcome.video, video_name(number, outcome.success, instruction))
        trial = outcome.trial
        row = {
            "episode_id": trial.id,
            "suite": trial.suite,
            "task_id": trial.task_id,
            "init_state": trial.init_state,
            "env_seed": trial.env_seed,
            "instruction": instruction,
            "success": outcome.success,
            "error": outcome.error,
            "steps": outcome.steps,
            "seconds": round(outcome.seconds, 2),
            "video": video,
            # tells whether two runs did the same, not only whether they ended alike
            "actions_sha256": None
            if outcome.actions is None
            else hashlib.sha256(outcome.actions.tobytes()).hexdigest()[:16],
            **asdict(outcome.account or Account(reason=f"The episode crashed: {outcome.error}")),
            **outcome.facts,
            "actions": None if outcome.actions is None else traces.save(self.path, trial.id, outcome.actions),
        }
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            with self.locked(), (self.path / RESULTS).open("ab", buffering=0) as results:
                if results.write(line) != len(line):
                    raise OSError("the disk is full")
                os.fsync(results.fileno())
        except OSError as error:
            raise no_room(self.path / RESULTS, error) from error
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

    def summarise(self) -> Row:
        """Write summary.json from what is on disk and return it."""
        with self.locked():
            run = json.loads((self.path / RUN).read_text())
            rows = read_rows(self.path)
            controls = beside(self.path, run["identity"], task_ids={row["task_id"] for row in rows})
            summary = summarise(rows, protocol={**run["identity"], **run["record"]}, controls=controls)
            write_json(self.path / SUMMARY, summary)
        return summary

    def close(self) -> None:
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> "RolloutFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close()
        if kind and not (self.path / RESULTS).exists():  # it failed before anything came of it: leave no trace
            for name in (RUN, SUMMARY, ".lock", f".lock-{self.rank}"):
                (self.path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else lies there
                self.path.rmdir()


def read_rows(folder: Path) -> list[Row]:
    """The lines of results.jsonl, the last one of each episode; [] without the file. ConfigError if it is damaged."""
    path = folder / RESULTS
    lines = (
        path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    )  # after the last newline: nothing, or a torn line
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.pop(row["episode_id"], None)
            rows[row["episode_id"]] = row
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{path}, line {number}, is damaged: remove that line, its episode is played again"
            ) from None
    return list(rows.values())


def video_name(number: int, success: bool, instruction: str) -> str:
    """`episode=…--success=…--task=….mp4`, as people of the OpenVLA repository know it."""
    task = re.sub(r"[^a-z0-9_-]", "_", instruction.lower())[:TASK_CHARACTERS]
    return f"episode={number}--success={success}--task={task}.mp4"


def poster_name(video: str) -> str:
    """Where a video's poster lies, within the rollout folder."""
    return f"{POSTERS}/{video.removesuffix('.mp4')}.jpg"


def evaluate(
    trials: Sequence[Trial],
    folder: RolloutFolder,
    *,
    setup: Setup,
    load_policy: Callable[[], Any] | None = None,
    num_workers: int | Callable[[], int] = 1,
    one_by_one: bool = False,
    retry_errors: bool = False,
    ranks: int = 1,
    silence_limit: float = SILENCE_LIMIT,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Row:
    """Play the trials that have no line yet, of those that are this rank's; returns the summary of the whole
    folder.

    setup.video_folder is set here to the folder's own place when it is not None. load_policy is called, once,
    only if there is something to play, and num_workers (when it is a function) after it, so that it sees the
    memory that is left. retry_errors: play those again that ended as errors. on_row: called with each new
    line. However it ends, summary.json is brought up to date.
    """
    world = importlib.import_module(setup.simulator)
    done = {row["episode_id"] for row in folder.rows() if not (retry_errors and row["error"])}
    pending = [trial for trial in trials[folder.rank :: ranks] if trial.id not in done]
    if pending:
        policy = load_policy() if load_policy else None
        if policy is not None and hasattr(policy, "card"):
            folder.note(policy_card=policy.metadata())
        setup = replace(
            setup,
            num_images=getattr(policy, "num_images", setup.num_images),
            video_folder=setup.video_folder and folder.unfinished.resolve(),
        )
        workers = min(max(num_workers() if callable(num_workers) else num_workers, 1), len(pending))
        meter = Meter(policy, workers=workers, rank=folder.rank)
        outcomes = play(
            pending,
            setup=setup,
            policy=meter,
            num_workers=workers,
            one_by_one=one_by_one,
            silence_limit=silence_limit,
            on_golden=meter.see,
        )
        try:
            with contextlib.closing(outcomes):
                for outcome in outcomes:
                    meter.hear(outcome)
                    on_row(folder.add(outcome, **names(world, outcome.trial)))
        finally:
            if meter.episodes:
                folder.add_session(meter.session())
            folder.summarise()
    return folder.summarise()


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last newline: a line that was being written when the machine stopped."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as results:
            results.truncate(content.rfind(b"\n") + 1)
