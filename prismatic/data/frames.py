"""Frame cache: a folder for random access, made once from a data set by `prismatic.data.writer`.

`frames.bin` holds the data set's own JPEG bytes end to end (each step's agent view, then its wrist view if there is one), `steps.npz` a row per
step, `meta.json` the rest. `Mixture` lines up the training frames of one or more caches as an endless shuffled sequence; its draw p depends on
seed and p alone, so that any run resumes exactly, whatever its workers.
"""

import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prismatic.data.cache_files import read_cache
from prismatic.errors import ConfigError
from prismatic.filenames import CACHE_FRAMES
from prismatic.normalize import Gripper, action_statistics, gripper_open_is_one

SHUFFLING_STREAM = 0  # keeps these random numbers apart from others that are drawn from a run's seed
# Of the episodes, the last ones on disk where tfds put them in an order by a hash of their names; drawn where they stand as recorded.
VAL_SHARE = 0.05
LARGEST_WEIGHT = 1000  # an epoch's order is in memory


class Step(NamedTuple):
    """One step of a demonstration, images still compressed (JPEG)."""

    dataset: str  # key of its statistics
    image: bytes  # agent view, upright
    wrist: bytes | None  # where the data set has one
    instruction: str
    actions: np.ndarray  # (K, D) float32, this step's first: the data set's units, gripper 1 open … 0 close
    state: np.ndarray | None  # (S,) float32, the robot's, where the data set has one


def num_train_episodes(num_episodes: int, val_share: float = VAL_SHARE) -> int:
    """How many of the episodes are for training where a data set has no validation split; at least one."""
    return max(1, round((100 - 100 * val_share) * num_episodes / 100))


class FrameCache:
    """A cache folder opened for reading. Pickles as its path.

    gripper: another convention than the one that was found when the cache was written. ConfigError where the folder is no whole cache, and
    where an image is read that has changed since it was written.
    """

    def __init__(self, folder: Path, gripper: Gripper | None = None) -> None:
        self.folder = Path(folder)
        meta, steps = read_cache(self.folder)
        self.name, self.fingerprint, self.file_paths = meta.name, meta.fingerprint, meta.file_paths
        self.notes, self.fps, self.action_names = meta.notes, meta.fps, meta.action_names
        self.has_wrist = len(meta.images) == 2
        self.gripper = gripper or meta.gripper
        grips = steps["action"][:, self.gripper.dims]
        self.gripper_low = float(grips.min()) if grips.size else None  # as recorded
        self.actions = gripper_open_is_one(steps["action"], self.gripper)  # (N, D) float32
        self.state: np.ndarray | None = steps.get("state")  # (N, S) float32, S = 8 in LIBERO
        self.episode, self.timestep = steps["episode"], steps["timestep"]  # (N,) int32
        self._distinct_instructions, self._instruction = meta.instructions, steps["instruction"]  # (N,) int32 into them
        self._offsets = steps["offsets"]  # (N * images + 1,) int64
        self._crc = steps.get("crc")  # (N * images,) uint32, None in an old one
        self._lengths = np.bincount(self.episode, minlength=len(self.file_paths))  # frames per episode
        self._train_episodes, self._rank = meta.train_episodes, np.arange(len(self.file_paths))
        if meta.in_order and meta.train_episodes is None:
            self._rank = np.random.default_rng(len(self._rank)).permutation(self._rank)

    def __reduce__(self) -> tuple:
        return FrameCache, (self.folder, self.gripper)

    def __len__(self) -> int:
        return len(self.actions)

    def step(self, frame: int, num_actions_chunk: int = 1) -> Step:
        """A frame with so many actions, its own the first. The caller picks a frame whose episode still has them: see train_indices."""
        wrist = self.wrist_bytes(frame) if self.has_wrist else None
        actions = self.actions[frame : frame + num_actions_chunk]
        state = None if self.state is None else self.state[frame]
        return Step(self.name, self.image_bytes(frame), wrist, self.instruction(frame), actions, state)

    def instruction(self, frame: int) -> str:
        """What the data set says at this step, as it is written there."""
        return self._distinct_instructions[self._instruction[frame]]

    def image_bytes(self, frame: int) -> bytes:
        """JPEG of the agent view."""
        return self._read(frame, 0)

    def wrist_bytes(self, frame: int) -> bytes:
        """JPEG of the wrist view; ConfigError where the data set has none."""
        if not self.has_wrist:
            raise ConfigError(f"{self.name} has no wrist_image: give --data_keys wrist=… or num_images_in_input 1")
        return self._read(frame, 1)

    def _read(self, frame: int, view: int) -> bytes:
        if not 0 <= frame < len(self):
            raise IndexError(frame)
        slot = frame * (2 if self.has_wrist else 1) + view
        start, end = self._offsets[slot : slot + 2].tolist()
        with (self.folder / CACHE_FRAMES).open("rb", buffering=0) as file:
            file.seek(start)
            image = file.read(end - start)
        if self._crc is not None and zlib.crc32(image) != self._crc[slot]:
            raise ConfigError(f"{file.name} has changed since it was written: delete its folder and run again")
        return image

    @property
    def instructions(self) -> list[str]:
        """Per episode, the instruction of its first step; empty where it has none."""
        texts = [""] * len(self.file_paths)
        for frame in np.flatnonzero(self.timestep == 0):
            texts[self.episode[frame]] = self.instruction(int(frame))
        return texts

    @functools.cached_property
    def statistics(self) -> dict[str, Any]:
        """This data set's entry in dataset_statistics.json, over all frames of all episodes."""
        return action_statistics(self.actions, self.state, len(self.file_paths), self.gripper.dims)

    def train_indices(self, val_share: float = VAL_SHARE, num_actions_chunk: int = 1) -> np.ndarray:
        """Frames (int64) of the training episodes that have num_actions_chunk actions from them on, without episodes that have no instruction.

        So the last K - 1 frames of an episode are left out, as in OpenVLA-OFT: nothing is padded or repeated.
        val_share, in [0, 1): the part of the episodes that is held out where the data set has no split for validation.
        """
        return self._indices(val_share, num_actions_chunk, training=True)

    def validation_indices(self, val_share: float = VAL_SHARE, num_actions_chunk: int = 1) -> np.ndarray:
        """Frames (int64) of the other episodes, with the same omissions; may be empty."""
        return self._indices(val_share, num_actions_chunk, training=False)

    def episodes_shorter_than(self, num_actions_chunk: int) -> int:
        """How many episodes give no chunk at all."""
        return int((self._lengths < num_actions_chunk).sum())

    def _indices(self, val_share: float, num_actions_chunk: int, *, training: bool) -> np.ndarray:
        by_share = num_train_episodes(len(self.file_paths), val_share)
        train = by_share if self._train_episodes is None else self._train_episodes
        of_split = (self._rank < train)[self.episode] == training
        whole = self.timestep + num_actions_chunk <= self._lengths[self.episode]
        said = np.array([text != "" for text in self._distinct_instructions])[self._instruction]
        return np.flatnonzero(of_split & whole & np.isin(self.episode, self.episode[said]))


@functools.lru_cache(maxsize=64)  # an epoch needs 1 to 3 a data set
def _permutation(length: int, seed: int, *of: int) -> np.ndarray:
    return np.random.default_rng((seed, SHUFFLING_STREAM, *of)).permutation(length).astype(np.int32)


class Mixture:
    """The training frames of one or more caches as an endless sequence: `mixture[p]` is the Step of draw p, with num_actions_chunk actions.

    An epoch, `len(mixture)` draws, takes round(weight · frames) of each data set (weight 1: each frame once),
    mixed anew by (seed, epoch). Of weight 1, no frame comes again before all others came. ConfigError
    for a bad weight, a data set without training frames, and two of one name (their statistics would share a key).
    """

    def __init__(
        self,
        caches: Sequence[FrameCache],
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        val_share: float = VAL_SHARE,
        num_actions_chunk: int = 1,
    ) -> None:
        weights = [1.0] * len(caches) if weights is None else weights
        names = [cache.name for cache in caches]
        if len(weights) != len(caches) or not all(0 < weight <= LARGEST_WEIGHT for weight in weights):
            said = f"a mixture of {names} needs a weight above 0 for each"
            raise ConfigError(f"{said}, of at most {LARGEST_WEIGHT}, not {list(weights)}")
        if len(set(names)) < len(names):
            raise ConfigError(f"a mixture can't hold two data sets of one name, {names}: rename a folder")
        widths = {cache.actions.shape[1] for cache in caches}
        if len(widths) > 1:
            raise ConfigError(f"a mixture can't hold actions of {sorted(widths)} numbers: train {names} one by one")
        self.caches = list(caches)
        self.seed = seed
        (self.action_dim,) = widths
        self.val_share, self.num_actions_chunk = val_share, num_actions_chunk
        self._frames = [cache.train_indices(val_share, num_actions_chunk) for cache in caches]
        for cache, frames in zip(caches, self._frames, strict=True):
            if len(frames) == 0:
                long = f" and {num_actions_chunk} steps" * (num_actions_chunk > 1)
                raise ConfigError(f"no training episode of {cache.name} has a language_instruction{long}: leave it out")
        self._shares = [
            max(1, round(weight * len(frames))) for weight, frames in zip(weights, self._frames, strict=True)
        ]
        self._ends = np.cumsum(self._shares)  # an epoch's slot belongs to the first data set whose end is above it

    @property
    def statistics(self) -> dict[str, Any]:
        """The content of dataset_statistics.json: an entry per data set, each normalised by its own."""
        return {cache.name: cache.statistics for cache in self.caches}

    @property
    def instructions(self) -> set[str]:
        """Everything that is said in the data."""
        return {text for cache in self.caches for text in cache.instructions}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, draw: int) -> Step:
        return self.step(*self.locate(draw))

    def step(self, dataset: int, frame: int) -> Step:
        """A frame of the data set of that number, for learning or for validation."""
        return self.caches[dataset].step(frame, self.num_actions_chunk)

    def origin(self, draw: int) -> tuple[str, int, int]:
        """Data set, episode in it and step of the episode that come at this draw."""
        dataset, frame = self.locate(draw)
        cache = self.caches[dataset]
        return cache.name, int(cache.episode[frame]), int(cache.timestep[frame])

    def held_out(self, most: int) -> list[tuple[int, int]]:
        """At most so many validation frames, as (data set, frame), evenly spaced over all of them: always the same ones."""
        of_each = [cache.validation_indices(self.val_share, self.num_actions_chunk) for cache in self.caches]
        frames = [(number, frame) for number, indices in enumerate(of_each) for frame in indices.tolist()]
        places = np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int)
        return [frames[place] for place in places]

    def locate(self, draw: int) -> tuple[int, int]:
        """Number of the data set and of the frame in it that come at this draw (≥ 0)."""
        epoch, place = divmod(draw, len(self))
        slot = _permutation(len(self), self.seed, 0, epoch)[place]
        dataset = int(np.searchsorted(self._ends, slot, side="right"))
        share = self._shares[dataset]
        nth = epoch * share + slot - (self._ends[dataset] - share)  # of all draws from this data set so far
        frames = self._frames[dataset]
        times, place = divmod(int(nth), len(frames))
        return dataset, int(frames[_permutation(len(frames), self.seed, 1 + dataset, times)[place]])
