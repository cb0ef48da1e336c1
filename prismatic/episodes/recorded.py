"""A data set's episodes as trials: the recorded actions, executed again from the state in which each was recorded. Is the data right?

Where an episode began is not in the RLDS files. Of the expert's (collect.py) it follows from the numbers in `file_path`; of
LIBERO's own demonstrations it stands in their HDF5 file, where the one with the same actions is looked up. A beginning that
doesn't look as recorded is no failure: the episode is left out, as an error that says so. Surprising: no-ops were dropped,
and pushes that the expert corrected were not recorded, so a pushed episode leaves its path and may well fail; an unpushed
one must follow it to the end and succeed. Images must be rendered as in the recording (render_quality): the other quality
has another reflection in the stove.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.data.frames import FrameCache
from prismatic.episodes.demonstration import beginning, is_no_op
from prismatic.episodes.replay import find_replays, read_demo
from prismatic.episodes.result import ReplayResult
from prismatic.episodes.trials import Recording, Trial
from prismatic.errors import ConfigError, PolicyError
from prismatic.image import decode_jpeg
from prismatic.normalize import gripper_open_is_one
from prismatic.rollout import Simulator
from prismatic.scene import suites

# file_path of the scripted expert's episodes; where a policy acted first, its actions were not recorded
OWN = re.compile(r"(\w+)/task(\d+)/seed(\d+)/attempt(\d+)")
START_HAND = 5.0  # mm between the hand at the start and where it was recorded, above which it is another start
START_IMAGE = 30.0  # levels of 255 by which a block of the first image may differ: a moved object gives more
BLOCK = 8  # pixels a side
PATH = 10.0  # mm from the recorded hand, above which a replay has left the recorded path

Beginning = tuple[int, int, np.ndarray | None, int | None]  # number in the data set, task, state, seed of a random one


class OtherStart(PolicyError):
    """It does not begin as it was recorded, and would not the next time."""


class RecordedActions:
    """An Actor whose t-th answer is the t-th recorded action. `result` says how far that follows the recording."""

    num_images, uses_state = 0, False

    def __init__(self, sim: Simulator, recording: Recording) -> None:
        self.sim, self.recording, self.step = sim, recording, 0
        self.result = ReplayResult(file_path=recording.file_path, recorded_steps=len(recording.actions))

    def chunk(self, frame: Any, instruction: str, wrist: Any = None, state: Any = None) -> np.ndarray:
        off = None  # mm between the hand and where it was when this step was recorded
        if self.recording.states is not None:
            off = float(1000 * np.linalg.norm(self.sim.state()[:3] - self.recording.states[self.step, :3]))
        if self.step == 0:
            self._check_start(off or 0.0)
        if off is not None and (self.result.followed_steps or 0) == self.step:  # never left so far
            self.result.followed_steps = self.step + (off < PATH)
        self.step += 1
        return self.recording.actions[self.step - 1 : self.step]

    def _check_start(self, hand: float) -> None:
        image = block_difference(self.sim.frame(), decode_jpeg(self.recording.first_frame))
        if hand > START_HAND or image > START_IMAGE:
            self.result.left_out = True
            raise OtherStart(
                f"the hand is {hand:.0f} mm off, the image {image:.0f} of 255 "
                f"(drawn with render_quality {self.sim.quality}; it must be the recording's)"
            )


def block_difference(image: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of two images (H, W, 3) uint8 in the mean of a block of pixels: rendering's fine grain averages out."""
    if image.shape != other.shape:
        return 255.0
    height, width, _ = image.shape
    difference = image.astype(np.float32) - other
    blocks = difference.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3).mean(axis=(1, 3))
    return float(np.abs(blocks).max())


def recorded_episodes(
    cache: FrameCache, suite: str, *, task_ids: Sequence[int], limit: int, from_hdf5: Path | None
) -> tuple[list[Trial], str]:
    """The first `limit` episodes of each task (none named: all) whose beginning is known, and a sentence on what was left out.

    from_hdf5: folder of LIBERO's *_demo.hdf5 files. ConfigError where no episode's beginning is known.
    """
    known = list(_of_libero(cache, suite, from_hdf5, task_ids) if from_hdf5 else _of_expert(cache, suite))
    counts: Counter[int] = Counter()
    chosen = []
    for number, task_id, state, seed in known:
        if (task_ids and task_id not in task_ids) or counts[task_id] == limit:
            continue
        counts[task_id] += 1
        frames = np.flatnonzero(cache.episode == number)
        recording = Recording(
            file_path=cache.file_paths[number],
            start=state,
            seed=seed,
            actions=cache.actions[frames],
            states=None if cache.state is None else cache.state[frames],
            first_frame=cache.image_bytes(int(frames[0])),
        )
        chosen.append(Trial(suite=suite, task_id=task_id, init_state=number, env_seed=0, recording=recording))
    if not chosen:
        raise ConfigError(
            f"no episode of {suite} in data set {cache.name} can be replayed (the first is {cache.file_paths[0]!r}): where "
            "each began is known of collect.py's own data sets; for LIBERO's demonstrations give --from_hdf5 FOLDER, "
            "their *_demo.hdf5 files"
        )
    of_all = f"the beginning of {len(known)} of {len(cache.file_paths)} episodes is known"
    return chosen, f"{cache.name}: {of_all}, {len(chosen)} are replayed"


def _of_expert(cache: FrameCache, suite: str) -> Iterator[Beginning]:
    for number, path in enumerate(cache.file_paths):
        found = OWN.fullmatch(path)
        if found and found[1] == suite:
            task_id, seed, attempt = map(int, found.groups()[1:])
            yield number, task_id, None, beginning(np.random.default_rng([seed, task_id, attempt]), perturbation=0.0)[0]


def _of_libero(cache: FrameCache, suite: str, folder: Path, task_ids: Sequence[int]) -> Iterator[Beginning]:
    """Episodes whose actions are those of a demonstration in the files, no-ops left out."""
    named: dict[str, list[int]] = defaultdict(list)  # two tasks may have one sentence
    for task_id in task_ids or range(suites.num_tasks(suite)):
        named[suites.instruction(suite, task_id)].append(task_id)
    wanted = {task_id for words in set(cache.instructions) for task_id in named.get(words, [])}
    by_actions: dict[bytes, tuple[int, np.ndarray]] = {}
    for job in find_replays(folder, suite, sorted(wanted), stage=folder, limit=10**6):
        state, actions = read_demo(job.source, job.demo)
        by_actions[_without_no_ops(actions).tobytes()] = (job.task_id, state)
    for number in range(len(cache.file_paths)):
        if match := by_actions.get(cache.actions[cache.episode == number].tobytes()):
            yield number, *match, None


def _without_no_ops(actions: np.ndarray) -> np.ndarray:
    """(T, 7) in LIBERO's convention → what a data set holds of them: float32, gripper 1 open … 0 close."""
    kept: list[np.ndarray] = []
    for action in actions:
        if not is_no_op(action, kept[-1] if kept else None):
            kept.append(action)
    return gripper_open_is_one(np.array(kept, dtype=np.float32).reshape(-1, 7))
