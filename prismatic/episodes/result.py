"""A line of results.jsonl, what came of one episode, its actions step by step, and run.json, as every later stage reads them."""

import io
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from prismatic.arrays import read_arrays
from prismatic.atomic import write_whole
from prismatic.errors import ConfigError
from prismatic.filenames import RESULTS, RUN
from prismatic.normalize import ACTION_DIMENSIONS
from prismatic.records import read_lines, read_record

AGAIN = "copy it again, or delete its folder and play again"
REPLAY = "remove that line, its episode is played again"
KNOWN_LATER = ("benchmark_files",)  # facts of a run that those of before did not record: they go on without
ACTIONS = "actions"  # folder of the episodes' actions within a rollout folder; an episode takes about 5 KB
Facts = dict[str, Any]  # of run.json and summary.json: JSON values
Count = Annotated[int, Meta(ge=0)]


class ReplayResult(Struct, kw_only=True):
    """How far a recorded episode's actions led along the recorded path."""

    file_path: str
    recorded_steps: Count
    followed_steps: Count | None = None  # None: it was not recorded where the hand was
    left_out: bool = False  # it did not begin as it was recorded


class EpisodeResult(Struct, kw_only=True):
    """One episode. `success` is None for an error: a crash says nothing about the policy. Fields with a default are missing in older runs;
    what older runs said besides (near_ties) is passed over.
    """

    episode_id: str
    suite: str
    task_id: Count
    init_state: Count
    env_seed: Count
    instruction: str
    success: bool | None
    error: str | None
    steps: Count
    seconds: float
    video: Annotated[str, Meta(pattern=r"^[^/\x00]{1,255}$")] | None = None  # within the rollout folder
    actions_sha256: str | None = None  # tells whether two runs did the same, not only whether they ended alike
    stages: dict[str, int | None] = msgspec.field(default_factory=dict)  # stage → its first step (scene/trajectory.py)
    verdict: str | None = None  # a code of scene/diagnosis.py
    reason: str | None = None
    actions: Annotated[str, Meta(pattern=r"^actions/[^/\x00]{1,255}$")] | None = None  # file of them
    instruction_given: str | None = None  # where it is another than the task's; may be ""
    moved_by_env_seed_mm: dict[str, float] | None = None  # against env seed 0
    replay: ReplayResult | None = None


class Run(Struct, kw_only=True):
    """run.json: what a run's numbers depend on, and what is merely known of it (versions, the policy, each call)."""

    identity: Facts = msgspec.field(default_factory=dict)
    record: Facts = msgspec.field(default_factory=dict)


def read_run(folder: Path) -> Run:
    """A rollout folder's run.json. ConfigError where it is missing or damaged."""
    run = read_record(folder / RUN, Run, way_out=AGAIN)
    sessions = run.record.get("sessions", [])
    if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
        raise ConfigError(f"{folder / RUN}: record.sessions is no list of calls: {AGAIN}")
    return run


def read_rows(folder: Path) -> list[EpisodeResult]:
    """The lines of results.jsonl, the last one of each episode; [] without the file. ConfigError if it is damaged."""
    path = folder / RESULTS
    rows: dict[str, EpisodeResult] = {}
    for row in read_lines(path, EpisodeResult, way_out=REPLAY) if path.exists() else ():
        rows.pop(row.episode_id, None)
        rows[row.episode_id] = row
    return list(rows.values())


def save_actions(folder: Path, episode_id: str, actions: np.ndarray) -> str:
    """Write (steps, 7) float32 to actions/<episode>.npz and return that name. ConfigError when it cannot be written.

    The name is the episode's own, so an episode played again replaces what an interrupted call may have left.
    """
    name = f"{ACTIONS}/{episode_id.replace('/', '-')}.npz"
    stream = io.BytesIO()
    np.savez_compressed(stream, actions=actions.astype(np.float32))
    (folder / ACTIONS).mkdir(exist_ok=True)
    write_whole(folder / name, stream.getvalue())
    return name


def load_actions(folder: Path, name: str | None) -> np.ndarray | None:
    """(steps, 7) float32; None where an older run kept none, or the file is gone or damaged: a report does without."""
    if not name or not (folder / name).is_file():
        return None
    try:
        actions = read_arrays(folder / name)["actions"]
    except Exception:  # zipfile, zlib and numpy each have their own for a damaged file
        return None
    whole = actions.ndim == 2 and actions.shape[1] == len(ACTION_DIMENSIONS) and actions.dtype.kind == "f"
    return actions if whole else None
