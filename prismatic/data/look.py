"""What a data set holds, and what of it would hurt: the facts of doctor.py's page, from an opened frame cache. No model, no simulator."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from prismatic.data.frames import FrameCache
from prismatic.data.gripper import FLAG as GRIPPER_FLAG
from prismatic.data.gripper import PROOF, SLACK
from prismatic.data.keys import FLAG as KEYS_FLAG
from prismatic.errors import ConfigError
from prismatic.image import decode_jpeg
from prismatic.normalize import ACTION_DIMENSIONS, GRIPPER_CONVENTIONS

NO_OP_NORM = 1e-4  # of the motion of a step, below which nothing moves
BINS = 40  # of a histogram
LARGEST_METRES = 0.12  # a position command that never exceeds this is likely metres a step; normalised ones reach 1
SAME_AS_STATE = 0.98  # correlation of a command with the state that follows, above which it is that state
CONSTANT_IMAGE = 1.0  # standard deviation of pixels, in levels, below which an image shows nothing
FEW_EPISODES = 10


Severity = Literal["wrong", "hurts"]  # what is learnt would be wrong, or worse than need be


class Finding(NamedTuple):
    """Something that would hurt."""

    severity: Severity
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
    counts: tuple[int, ...]  # a histogram from low to high


class Look(NamedTuple):
    """Everything the page shows but for the images."""

    lengths: np.ndarray  # steps of each episode
    train_episodes: int
    instructions: list[tuple[str, int]]  # and how many episodes begin with each
    dimensions: list[Dimension]
    no_ops: float  # share of the steps
    still_frames: float  # share of the longest episode's images that are byte for byte the one before
    duplicates: int  # episodes that are another one again
    findings: list[Finding]


def look(cache: FrameCache) -> Look:
    """All facts. Reads and decodes one whole episode; ConfigError for an image that isn't one."""
    lengths = np.bincount(cache.episode, minlength=len(cache.file_paths))
    said = Counter(text for text, length in zip(cache.instructions, lengths, strict=True) if length)
    grippers = sorted({dim % cache.actions.shape[1] for dim in cache.gripper.dims})
    dimensions = [_dimension(cache, dim, dim in grippers) for dim in range(cache.actions.shape[1])]
    motion, grip = np.delete(cache.actions, grippers, axis=1), cache.actions[:, grippers]
    same = np.r_[True, (grip[1:] == grip[:-1]).all(axis=1)] | (cache.timestep == 0)
    no_ops = float(np.mean((np.linalg.norm(motion, axis=1) < NO_OP_NORM) & same))
    train = len(np.unique(cache.episode[cache.train_indices()]))
    spread, still = _decoded_episode(cache)
    facts = Look(lengths, train, said.most_common(), dimensions, no_ops, still, _duplicates(cache, lengths), [])
    blank = sum(not cache.instruction(frame) for frame in cache.train_indices().tolist())
    rows = [*_of_actions(cache, facts, motion[:, :3]), *_of_episodes(facts, blank), *_of_images(spread, still)]
    findings = [Finding(severity, text, remedy) for there, severity, text, remedy in rows if there]
    return facts._replace(findings=sorted(findings, key=lambda finding: finding.severity, reverse=True))


def _dimension(cache: FrameCache, dim: int, gripper: bool) -> Dimension:
    """Its name is the data set's own, the usual one of seven, or a number."""
    values, stats = cache.actions[:, dim], cache.statistics["action"]
    dims = cache.actions.shape[1]
    names = next((names for names in (cache.action_names, ACTION_DIMENSIONS) if len(names) == dims), range(dims))
    low, high, q01, q99 = (float(stats[key][dim]) for key in ("min", "max", "q01", "q99"))
    counts, _ = np.histogram(values, BINS, range=(low, high) if high > low else (low - 1, low + 1))
    return Dimension(str(names[dim]), gripper, low == high, low, high, q01, q99, tuple(counts.tolist()))


def _duplicates(cache: FrameCache, lengths: np.ndarray) -> int:
    """Episodes whose actions and first image another one has already."""
    starts = np.cumsum([0, *lengths[:-1]])
    seen = {
        hashlib.blake2b(cache.actions[start : start + length].tobytes() + cache.image_bytes(start)).digest()
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        if length
    }
    return int((lengths > 0).sum()) - len(seen)


def _decoded_episode(cache: FrameCache) -> tuple[dict[str, float], float]:
    """Of the longest episode: of each view the largest spread of an image's pixels, and the share of images that repeat the one before."""
    number = int(np.argmax(np.bincount(cache.episode)))
    frames = np.flatnonzero(cache.episode == number).tolist()
    spread, still = {}, 0.0
    for name, read in (("image", cache.image_bytes), ("wrist image", cache.wrist_bytes))[: 1 + cache.has_wrist]:
        jpegs = [read(frame) for frame in frames]
        try:
            shapes, deviations = zip(*((pixels.shape, pixels.std()) for pixels in map(decode_jpeg, jpegs)), strict=True)
        except ValueError as error:
            raise ConfigError(
                f"an {name} of episode {number + 1} of {cache.name} is no whole JPEG ({error}): repair or drop it"
            ) from None
        if len({*shapes}) > 1:
            raise ConfigError(
                f"episode {number + 1} of {cache.name} has {name}s of several sizes: give one whose frames agree"
            )
        spread[name] = float(max(deviations))
        still = max(still, sum(a == b for a, b in zip(jpegs[1:], jpegs[:-1], strict=True)) / len(jpegs))
    return spread, still


# What may be found: whether it is there, how bad it is, what it is, what mends it.
Row = tuple[object, Severity, str, str]


def _of_images(spread: dict[str, float], still: float) -> Iterable[Row]:
    for name, deviation in spread.items():
        text = f"the {name}s of the longest episode show one colour"
        yield deviation < CONSTANT_IMAGE, "wrong", text, f"{KEYS_FLAG} names another camera, or leaves it out"
    text = f"{still:.0%} of an episode's images are the one before again"
    yield still > 0.2, "hurts", text, "record actions and images at one rate"


def _of_episodes(facts: Look, blank: int) -> Iterable[Row]:
    lengths, train, texts = facts.lengths, facts.train_episodes, dict(facts.instructions)
    silent, empty, single = texts.get("", 0), (lengths == 0).sum(), (lengths == 1).sum()
    alike = len(texts) - len({" ".join(text.split()).lower() for text in texts})
    return (
        (train == 0, "wrong", "no training episode has an instruction", f"{KEYS_FLAG} instruction=… names the field that has them"),
        (silent and train, "hurts", f"{silent} episodes begin without an instruction", "episodes without any are left out; write one for each"),
        (blank, "hurts", f"{blank} steps have no instruction in episodes with one", "they are learnt as told nothing: write it at each step"),
        (alike, "hurts", f"{alike} instructions are another one with other blanks or capitals", "capitals don't matter, blanks do: unify"),
        (empty, "hurts", f"{empty} episodes have no step", "leave them out"),
        (single, "hurts", f"{single} episodes have one step", "an action chunk needs as many steps as it has actions"),
        (facts.duplicates, "hurts", f"{facts.duplicates} episodes are another one again",
         "leave them out: they count twice, and validate what was learnt"),
        (len(lengths) < FEW_EPISODES, "hurts", f"only {len(lengths)} episodes",
         "--val_share 0.2 holds some out; some ten a task are a start"),
    )  # fmt: skip


def _of_actions(cache: FrameCache, facts: Look, positions: np.ndarray) -> Iterable[Row]:
    motion = [dimension for dimension in facts.dimensions if not dimension.gripper]
    dead = [dimension.name for dimension in motion if dimension.dead]
    all_dead = motion and len(dead) == len(motion)
    beyond = ", ".join(d.name for d in motion if max(abs(d.low), abs(d.high)) > 1.001)
    still = any(dimension.gripper and dimension.dead for dimension in facts.dimensions)
    lowest = cache.gripper_low or 0.0
    unclear = PROOF < lowest < -SLACK and "says" not in cache.gripper.evidence
    convention = GRIPPER_CONVENTIONS.get(cache.gripper.convention)
    largest = float(np.abs(positions[:, np.ptp(positions, axis=0) > 0]).max(initial=0))
    other = f"{KEYS_FLAG} action=… names another field"
    return (
        (all_dead, "wrong", "no dimension of the actions ever changes", other),
        (dead and not all_dead, "hurts", f"dimensions {', '.join(dead)} never change",
         f"right for a robot that doesn't use them; else {KEYS_FLAG} action=…"),
        (unclear, "wrong", f"the gripper's smallest value is {lowest:.3g}, neither 0 nor -1: read as {convention}",
         f"{GRIPPER_FLAG} one_open, zero_open or minus_one_open says which"),
        (still, "hurts", "the gripper never moves", f"{GRIPPER_FLAG} none, or {KEYS_FLAG} action=…"),
        (facts.no_ops > 0.05, "hurts", f"{facts.no_ops:.0%} of the steps do nothing", "drop them: a policy learns to stand still"),
        (0 < largest < LARGEST_METRES, "hurts", f"position commands stay within ±{largest:.2g}: metres a step, not LIBERO's -1 … 1 (1 is 5 cm)",
         "right for a robot that takes metres; for LIBERO divide by 0.05"),
        (beyond, "hurts", f"commands of {beyond} leave -1 … 1: not the normalised commands that LIBERO takes",
         f"right for a robot that takes such units; {other}"),
        (_absolute(cache, positions), "hurts", "actions look absolute (a position), not relative (a step)",
         "OpenVLA's recipe learns relative ones: subtract the state, or act with absolute ones"),
    )  # fmt: skip


def _absolute(cache: FrameCache, positions: np.ndarray) -> bool:
    """Whether position commands are the state that follows, or all change and never their sign."""
    live = np.flatnonzero(np.ptp(positions, axis=0) > 0)
    if len(live) == 0 or len(positions) < 4:
        return False
    if cache.state is not None and cache.state.shape[1] >= positions.shape[1]:
        inside = cache.timestep[1:] > 0
        for dim in live:
            commands, next_state = positions[:-1, dim][inside], cache.state[1:, dim][inside]
            moving = len(commands) > 3 and np.ptp(next_state) > 0 < np.ptp(commands)
            if moving and np.corrcoef(commands, next_state)[0, 1] > SAME_AS_STATE:
                return True
    one_sign = (positions > 0).all(axis=0) | (positions < 0).all(axis=0)
    return len(live) == positions.shape[1] and bool(one_sign.all())
