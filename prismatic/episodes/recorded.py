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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.data.frames import FrameCache
from prismatic.episodes.demonstration import beginning, is_no_op
from prismatic.episodes.replay import find_replays, read_demo
from prismatic.episodes.result import ReplayResult
from prismatic.episodes.trials import Trial
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


class OtherStart(PolicyError):
    """It does not begin as it was recorded, and would not the next time."""


@dataclass(frozen=True)
class RecordedEpisode(Trial):
    """A recorded episode. init_state is its number in the data set."""

    file_path: str
    first_state: np.ndarray | None = field(compare=False)  # as init_states has them; or
    first_seed: int | None  # that of a randomised start
    actions: np.ndarray = field(compare=False)  # (T, 7) float32, gripper 1 open … 0 close
    states: np.ndarray | None = field(compare=False)  # (T, 8) float32 as Simulator.state, where they were recorded
    first_frame: bytes = field(compare=False)  # JPEG

    @property
    def id(self) -> str:
        return f"{self.suite}/task{self.task_id}/demo{self.init_state}/seed{self.env_seed}"

    @property
    def start(self) -> np.ndarray | None:
        return self.first_state

    @property
    def reset_seed(self) -> int | None:
        return self.first_seed

    @property
    def max_steps(self) -> int:
        return len(self.actions)


class RecordedActions:
    """An Actor whose t-th answer is the t-th recorded action. `result` says how far that follows the recording."""

    num_images, uses_state = 0, False

    def __init__(self, sim: Simulator, episode: RecordedEpisode) -> None:
        self.sim, self.episode, self.step = sim, episode, 0
        self.result = ReplayResult(file_path=episode.file_path, recorded_steps=len(episode.actions))

    def chunk(self, frame: Any, instruction: str, wrist: Any = None, state: Any = None) -> np.ndarray:
        off = self._off_path()
        if self.step == 0:
            self._check_start(off)
        if off is not None and (self.result.followed_steps or 0) == self.step:  # never left so far
            self.result.followed_steps = self.step + (off < PATH)
        self.step += 1
        return self.episode.actions[self.step - 1 : self.step]

    def _off_path(self) -> float | None:
        """mm between the hand and where it was when this step was recorded."""
        if self.episode.states is None:
            return None
        return float(1000 * np.linalg.norm(self.sim.state()[:3] - self.episode.states[self.step, :3]))

    def _check_start(self, hand: float | None) -> None:
        image = block_difference(self.sim.frame(), decode_jpeg(self.episode.first_frame))
        if (hand or 0.0) > START_HAND or image > START_IMAGE:
            self.result.left_out = True
            raise OtherStart(
                f"the hand is {hand or 0.0:.0f} mm off, the image {image:.0f} of 255 "
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
) -> tuple[list[RecordedEpisode], str]:
    """The first `limit` episodes of each task (none named: all) whose beginning is known, and a sentence on what was left out.

    from_hdf5: folder of LIBERO's *_demo.hdf5 files. ConfigError where no episode's beginning is known.
    """
    known = _of_libero(cache, suite, from_hdf5, task_ids) if from_hdf5 else _of_expert(cache)
    found = [demo for demo in known if demo.suite == suite]
    tasks = set(task_ids) or {demo.task_id for demo in found}
    counts: Counter[int] = Counter()
    chosen = []
    for demo in found:
        counts[demo.task_id] += demo.task_id in tasks
        if demo.task_id in tasks and counts[demo.task_id] <= limit:
            chosen.append(demo)
    if not chosen:
        raise ConfigError(
            f"no episode of {suite} in data set {cache.name} can be replayed (the first is {cache.file_paths[0]!r}): where "
            "each began is known of collect.py's own data sets; for LIBERO's demonstrations give --from_hdf5 FOLDER, "
            "their *_demo.hdf5 files"
        )
    episodes = len(cache.file_paths)
    return (
        chosen,
        f"{cache.name}: the beginning of {len(found)} of {episodes} episodes is known, {len(chosen)} are replayed",
    )


def _episode(
    cache: FrameCache, episode: int, *, suite: str, task_id: int, state: np.ndarray | None, seed: int | None
) -> RecordedEpisode:
    frames = np.flatnonzero(cache.episode == episode)
    return RecordedEpisode(
        suite=suite,
        task_id=task_id,
        init_state=episode,
        env_seed=0,
        file_path=cache.file_paths[episode],
        first_state=state,
        first_seed=seed,
        actions=cache.actions[frames],
        states=None if cache.state is None else cache.state[frames],
        first_frame=cache.image_bytes(int(frames[0])),
    )


def _of_expert(cache: FrameCache) -> Iterator[RecordedEpisode]:
    for episode, path in enumerate(cache.file_paths):
        numbers = OWN.fullmatch(path)
        if numbers:
            task_id, seed, attempt = map(int, numbers.groups()[1:])
            reset_seed, _ = beginning(np.random.default_rng([seed, task_id, attempt]), perturbation=0.0)
            yield _episode(cache, episode, suite=numbers[1], task_id=task_id, state=None, seed=reset_seed)


def _of_libero(cache: FrameCache, suite: str, folder: Path, task_ids: Iterable[int]) -> Iterator[RecordedEpisode]:
    """Episodes whose actions are those of a demonstration in the files, no-ops left out."""
    named: dict[str, list[int]] = defaultdict(list)  # two tasks may have one sentence
    for task_id in task_ids or range(suites.num_tasks(suite)):
        named[suites.instruction(suite, task_id)].append(task_id)
    wanted = {task_id for words in set(cache.instructions) for task_id in named.get(words, [])}
    by_actions: dict[bytes, tuple[int, np.ndarray]] = {}
    for job in find_replays(folder, suite, sorted(wanted), stage=folder, limit=10**6):
        state, actions = read_demo(job.source, job.demo)
        by_actions[_without_no_ops(actions).tobytes()] = (job.task_id, state)
    for episode in range(len(cache.file_paths)):
        match = by_actions.get(cache.actions[cache.episode == episode].tobytes())
        if match:
            yield _episode(cache, episode, suite=suite, task_id=match[0], state=match[1], seed=None)


def _without_no_ops(actions: np.ndarray) -> np.ndarray:
    """(T, 7) in LIBERO's convention → what a data set holds of them: float32, gripper 1 open … 0 close."""
    kept: list[np.ndarray] = []
    for action in actions:
        if not is_no_op(action, kept[-1] if kept else None):
            kept.append(action)
    return gripper_open_is_one(np.array(kept, dtype=np.float32).reshape(-1, 7))
