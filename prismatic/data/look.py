"""What a data set holds, and what of it would hurt: the facts of doctor.py's page, from an opened frame cache. No model, no simulator."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from prismatic.data.frames import FrameCache
from prismatic.data.gripper import WEAK_PROOF
from prismatic.errors import ConfigError
from prismatic.image import decode_jpeg
from prismatic.normalize import ACTION_DIMENSIONS

NO_OP_NORM = 1e-4  # of the motion of a step, below which nothing moves
BINS = 40  # of a histogram
LARGEST_METRES = 0.12  # a position command that never exceeds this is likely metres a step; normalised ones reach 1
SAME_AS_STATE = 0.98  # correlation of a command with the state that follows, above which it is that state
CONSTANT_IMAGE = 1.0  # standard deviation of pixels, in levels, below which an image shows nothing
FEW_EPISODES = 10


class Finding(NamedTuple):
    """Something that would hurt. wrong: what is learnt would be wrong; hurts: it would be worse than need be."""

    severity: Literal["wrong", "hurts"]
    text: str
    remedy: str  # the flag or the step that mends it


class Dimension(NamedTuple):
    """One number of the actions, as training takes them (gripper 1 open … 0 close)."""

    name: str
    gripper: bool
    dead: bool  # never changes
    low: float
    high: float
    q01: float
    q99: float
    clipped: float  # share of the values beyond q01 and q99, which tokens can't say
    counts: tuple[int, ...]  # a histogram from low to high


class Look(NamedTuple):
    """Everything the page shows but for the images."""

    lengths: np.ndarray  # steps of each episode
    train_episodes: int
    instructions: list[tuple[str, int]]  # and how many episodes begin with each
    dimensions: list[Dimension]
    no_ops: float  # share of the steps
    still_frames: float  # share of the images that are byte for byte the one before
    duplicates: int  # episodes that are another one again
    findings: list[Finding]


def look(cache: FrameCache) -> Look:
    """All facts. Reads and decodes one whole episode; ConfigError for an image that isn't one."""
    lengths = np.bincount(cache.episode, minlength=len(cache.file_paths))
    said = Counter(text for text, length in zip(cache.instructions, lengths, strict=True) if length)
    dimensions = [_dimension(cache, dim) for dim in range(cache.actions.shape[1])]
    seen = _decoded_episode(cache)
    train = len(np.unique(cache.episode[cache.train_indices()]))
    facts = Look(
        lengths, train, said.most_common(), dimensions, _no_ops(cache), seen["still"], _duplicates(cache, lengths), []
    )
    findings = [*_findings_of_actions(cache, facts), *_findings_of_episodes(cache, facts), *_findings_of_images(seen)]
    return facts._replace(findings=sorted(findings, key=lambda finding: finding.severity, reverse=True))


def action_names(cache: FrameCache) -> Sequence[str]:
    """Of each dimension: the data set's own, the usual ones of seven, or numbers."""
    dims = cache.actions.shape[1]
    if len(cache.action_names) == dims:
        return cache.action_names
    return ACTION_DIMENSIONS if dims == len(ACTION_DIMENSIONS) else [str(dim) for dim in range(dims)]


def _dimension(cache: FrameCache, dim: int) -> Dimension:
    values, stats = cache.actions[:, dim], cache.statistics["action"]
    low, high, q01, q99 = (float(stats[key][dim]) for key in ("min", "max", "q01", "q99"))
    gripper = dim in _gripper_dims(cache)
    clipped = 0.0 if gripper else float(np.mean((values < q01) | (values > q99)))
    counts, _ = np.histogram(values, BINS, range=(low, high) if high > low else (low - 1, low + 1))
    return Dimension(
        action_names(cache)[dim], gripper, low == high, low, high, q01, q99, clipped, tuple(counts.tolist())
    )


def _gripper_dims(cache: FrameCache) -> set[int]:
    return {dim % cache.actions.shape[1] for dim in cache.gripper.dims}


def _motion(cache: FrameCache) -> np.ndarray:
    """(N, D'): the actions without grippers."""
    return np.delete(cache.actions, sorted(_gripper_dims(cache)), axis=1)


def _no_ops(cache: FrameCache) -> float:
    """Share of the steps without motion, the gripper as a step before."""
    grip = cache.actions[:, sorted(_gripper_dims(cache))]
    same = np.r_[True, (grip[1:] == grip[:-1]).all(axis=1)] | (cache.timestep == 0)
    return float(np.mean((np.linalg.norm(_motion(cache), axis=1) < NO_OP_NORM) & same))


def _duplicates(cache: FrameCache, lengths: np.ndarray) -> int:
    """Episodes whose actions and first image another one has already."""
    seen = Counter()
    starts = np.cumsum([0, *lengths[:-1]])
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        if length:
            content = cache.actions[start : start + length].tobytes() + cache.image_bytes(start)
            seen[hashlib.blake2b(content).digest()] += 1
    return sum(seen.values()) - len(seen)


def _decoded_episode(cache: FrameCache) -> dict[str, float]:
    """The longest episode decoded: share of images that repeat the one before, smallest spread of pixels of each view."""
    number = int(np.argmax(np.bincount(cache.episode)))
    frames = np.flatnonzero(cache.episode == number).tolist()
    found, still = {}, 0.0
    for name, read in (("image", cache.image_bytes), ("wrist image", cache.wrist_bytes))[: 1 + cache.has_wrist]:
        jpegs = [read(frame) for frame in frames]
        try:
            pixels = [decode_jpeg(jpeg) for jpeg in jpegs]
        except ValueError as error:
            raise ConfigError(
                f"an {name} of episode {number + 1} of {cache.name} is no whole JPEG ({error}): repair or drop it"
            ) from None
        if len({frame.shape for frame in pixels}) > 1:
            raise ConfigError(
                f"episode {number + 1} of {cache.name} has {name}s of several sizes: give one whose frames agree"
            )
        found[name] = max(float(frame.std()) for frame in pixels)
        still = max(still, sum(a == b for a, b in zip(jpegs[1:], jpegs[:-1], strict=True)) / len(jpegs))
    return found | {"still": still}


def _findings_of_images(seen: dict[str, float]) -> Iterator[Finding]:
    for name in seen.keys() - {"still"}:
        if seen[name] < CONSTANT_IMAGE:
            yield Finding(
                "wrong",
                f"the {name}s of the longest episode show one colour",
                "--data_keys names another camera, or leaves it out",
            )
    if seen["still"] > 0.2:
        text = f"{seen['still']:.0%} of an episode's images are the one before again"
        yield Finding("hurts", text, "record actions and images at one rate")


def _findings_of_episodes(cache: FrameCache, facts: Look) -> Iterator[Finding]:
    lengths, texts = facts.lengths, [text for text, _ in facts.instructions]
    if facts.train_episodes == 0:
        yield Finding(
            "wrong", "no training episode has an instruction", "--data_keys instruction=… names the field that has them"
        )
    silent = dict(facts.instructions).get("", 0)
    if silent and facts.train_episodes:
        yield Finding(
            "hurts",
            f"{silent} episodes begin without an instruction",
            "episodes without any are left out; write one for each",
        )
    alike = Counter(" ".join(text.split()).lower() for text in texts)
    if len(alike) < len(texts):
        pairs = len(texts) - len(alike)
        yield Finding(
            "hurts",
            f"{pairs} instructions are another one with other blanks or capitals",
            "capitals don't matter, blanks do: unify",
        )
    if (lengths == 0).any():
        yield Finding("hurts", f"{(lengths == 0).sum()} episodes have no step", "leave them out")
    if (lengths == 1).any():
        yield Finding(
            "hurts",
            f"{(lengths == 1).sum()} episodes have one step",
            "an action chunk needs as many steps as it has actions",
        )
    if facts.duplicates:
        yield Finding(
            "hurts",
            f"{facts.duplicates} episodes are another one again",
            "leave them out: they count twice, and validate what was learnt",
        )
    if len(lengths) < FEW_EPISODES:
        yield Finding(
            "hurts", f"only {len(lengths)} episodes", "--val_share 0.2 holds some out; some ten a task are a start"
        )


def _findings_of_actions(cache: FrameCache, facts: Look) -> Iterator[Finding]:
    motion = [dimension for dimension in facts.dimensions if not dimension.gripper]
    dead = [dimension.name for dimension in motion if dimension.dead]
    raw_low = cache.gripper_low
    if motion and len(dead) == len(motion):
        yield Finding("wrong", "no dimension of the actions ever changes", "--data_keys action=… names another field")
    elif dead:
        yield Finding(
            "hurts",
            f"dimensions {', '.join(dead)} never change",
            "right for a robot that doesn't use them; else --data_keys action=…",
        )
    if (
        cache.gripper.convention == "minus_one_open"
        and raw_low is not None
        and WEAK_PROOF < raw_low < 0
        and "says" not in cache.gripper.evidence
    ):
        text = f"the gripper's smallest value is {raw_low:.3g}: read as -1 open / +1 close, but it may be noise about 0"
        yield Finding("wrong", text, "--gripper one_open, zero_open or minus_one_open says which")
    if any(dimension.gripper and dimension.dead for dimension in facts.dimensions):
        yield Finding("hurts", "the gripper never moves", "--gripper none, or --data_keys action=…")
    if facts.no_ops > 0.05:
        yield Finding(
            "hurts", f"{facts.no_ops:.0%} of the steps do nothing", "drop them: a policy learns to stand still"
        )
    values = _motion(cache)[:, :3]
    moving = values[:, values.std(axis=0) > 0]
    if moving.size and np.abs(moving).max() < LARGEST_METRES:
        text = (
            f"position commands stay within ±{np.abs(moving).max():.2g}: metres a step, not LIBERO's -1 … 1 (1 is 5 cm)"
        )
        yield Finding("hurts", text, "right for a robot that takes metres; for LIBERO divide by 0.05")
    beyond = [d.name for d in motion if max(abs(d.low), abs(d.high)) > 1.001]
    if beyond:
        text = f"commands of {', '.join(beyond)} leave -1 … 1: not the normalised commands that LIBERO takes"
        yield Finding(
            "hurts", text, "right for a robot that takes such units; --data_keys action=… names another field"
        )
    if _absolute(cache, values):
        text = "actions look absolute (a position), not relative (a step)"
        yield Finding(
            "hurts", text, "OpenVLA's recipe learns relative ones: subtract the state, or act with absolute ones"
        )


def _absolute(cache: FrameCache, values: np.ndarray) -> bool:
    """Whether position commands are the state that follows, or never change their sign."""
    live = np.ptp(values, axis=0) > 0
    if not live.any() or len(values) < 4:
        return False
    if cache.state is not None and cache.state.shape[1] >= values.shape[1]:
        inside = cache.timestep[1:] > 0
        for dim in np.flatnonzero(live):
            commands, next_state = values[:-1, dim][inside], cache.state[1:, dim][inside]
            if (
                len(commands) > 3
                and np.ptp(next_state) > 0 < np.ptp(commands)
                and np.corrcoef(commands, next_state)[0, 1] > SAME_AS_STATE
            ):
                return True
    signs = [(values[:, dim] > 0).all() or (values[:, dim] < 0).all() for dim in np.flatnonzero(live)]
    return live.sum() == values.shape[1] and all(signs)
