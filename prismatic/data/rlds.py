"""RLDS data sets: staged episodes → data set; data set → frame cache, for the forms that people's data sets really have.

The only user of TensorFlow, which crashes beside triton, torchvision or an osmesa context: both functions
start `python -m prismatic.data.rlds` as a child that imports it, and what goes wrong there comes back as a
ConfigError. A frame that is a JPEG is neither decoded nor encoded: its bytes stay the same from its first writing to the
training batch.
"""

import ctypes
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from prismatic.data.dataset_folder import AGAIN, check_whole, dataset_name, find_dataset, is_lerobot, listing
from prismatic.data.keys import find_keys, parse_data_keys, sentences
from prismatic.data.made_once import cached, made_of_staged
from prismatic.data.staging import StagedEpisode, load_episode, stage_episode
from prismatic.data.writer import CacheWriter
from prismatic.errors import ConfigError
from prismatic.image import decode_jpeg

__all__ = ["build_cache", "find_dataset", "stage_episode", "write_dataset"]

VERSION = "1.0.0"  # of every data set that we write
REMEDIES = {"No space left": "free some space or give another folder", "DataLossError": AGAIN}
PARENT = "OPENVLA_PARENT_PID"
PR_SET_PDEATHSIG = 1  # Linux prctl: be sent a signal when the parent dies
CHILD_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",  # a TensorFlow with GPU support would take the whole GPU
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",  # otherwise it prints a notice at each start
}


def build_cache(rlds_dir: Path, cache_dir: Path, *, data_keys: str = "", rotate_images: bool = False) -> Path:
    """The frame cache of an RLDS data set (its version folder) under `cache_dir`, made now if it isn't there.

    data_keys: which fields are meant, see keys.py. rotate_images: turn each image by 180°. A data set whose files changed since (name,
    size, time) gets a new one. ConfigError for a folder that is no such data set, is damaged, or lacks an image, an action or an instruction.
    """
    source = Path(rlds_dir).absolute()  # a link keeps its own name
    if not source.is_dir():
        raise ConfigError(f"the RLDS data set {source} doesn't exist: give a version folder, such as …/1.0.0")
    told = parse_data_keys(data_keys)

    def fill(folder: Path) -> None:
        check_whole(source)
        _in_child(f"reading {source}", "read", source, folder, json.dumps([told, rotate_images]))

    files = listing(source.iterdir())
    identity = [files, sorted(told.items()), rotate_images]
    if any("-validation." in str(name) for name, *_ in files):  # earlier caches were made without that split
        identity.append("validation")
    return cached(cache_dir, dataset_name(source), identity, fill)


def check_name(name: str) -> None:
    """ConfigError where tfds would not take it as a data set's name."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,99}", name):
        rule = "use small letters, digits and _, a letter first, at most 100"
        raise ConfigError(f"{name[:120]!r} can't name a data set (dataset_name): {rule}")


def write_dataset(episodes: Path, output: Path, name: str) -> Path:
    """The staged episodes (`*.npz` in a folder) as RLDS data set `output/name/1.0.0`, unless it holds just these.

    Their order on disk goes by a hash of the files' names, as always with tfds. See made_of_staged for what is replaced or kept.
    """
    check_name(name)
    target = Path(output).absolute() / name / VERSION
    if is_lerobot(target.parent):
        raise ConfigError(f"{target.parent} is a LeRobot data set: give another dataset_name")

    def fill(folder: Path, paths: Sequence[Path]) -> None:
        _in_child(f"writing {target}", "write", paths[0].parent, folder, name)

    return made_of_staged(episodes, target, fill)


def _in_child(doing: str, *arguments: str | Path) -> None:
    """Run `main` below in a new process. Its progress bar goes to our stderr. ConfigError for whatever goes wrong."""
    child = subprocess.run(
        [sys.executable, "-m", "prismatic.data.rlds", *map(str, arguments)],
        cwd=Path(__file__).resolve().parents[2],  # where it finds this package
        env=os.environ | CHILD_ENVIRONMENT | {PARENT: str(os.getpid())},
        stdout=subprocess.PIPE,
        text=True,
    )
    if child.returncode != 0 or not child.stdout:
        hint = ", perhaps for want of memory" if child.returncode == -signal.SIGKILL else ""
        raise ConfigError(f"{doing} failed, its process ended with code {child.returncode}{hint}: start it again")
    kind, sentence, trace = json.loads(child.stdout)
    if kind == ConfigError.__name__:
        raise ConfigError(sentence)
    if kind:
        remedy = next((do for sign, do in REMEDIES.items() if sign in f"{kind} {sentence}"), "nothing was changed")
        raise ConfigError(f"{doing} failed ({kind}: {sentence}): {remedy}") from RuntimeError(trace)


# From here on: the child.


def _read(source: Path, folder: Path, options: str) -> None:
    """Stream the data set into the cache's three files; an episode's images are in memory at a time."""
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    told, rotate = json.loads(options)
    builder: Any = tfds.builder_from_directory(source)
    there = {name: split.num_examples for name, split in builder.info.splits.items()}
    if "train" not in there:
        raise ConfigError(f"{source} has no split named train, only {list(there)}: rename one")
    held_out = next((name for name in ("val", "validation") if name in there), None)
    splits = {name: there[name] for name in ("train", held_out) if name}  # in this order
    unused = [name for name in there if name not in splits]
    keys = find_keys(_fields(tfds, builder.info.features), told, str(source))
    assert keys.instruction  # else find_keys, which was given texts, would have raised
    several, fields = False, {}
    writer = CacheWriter(folder, name=dataset_name(source), source=str(source), views=keys.views, rotate=rotate)
    stored = itertools.chain.from_iterable(_stored_episodes(tfds, builder, split) for split in splits)
    bar = tqdm(stored, total=sum(splits.values()), desc=f"reading {dataset_name(source)}", unit="episode")
    for example in bar:
        metadata = example.get("episode_metadata", {})
        fields = dict(_flat(example["steps"])) | dict(_flat({"episode_metadata": metadata}))
        action, text = _vector(fields, keys.action), fields[keys.instruction]
        said = [text] * len(action) if np.ndim(text) == 0 else list(text)
        several |= np.ndim(text) > 1
        writer.add(
            zip(*(fields[view] for view in keys.views), strict=True),
            action=action,
            state=_vector(fields, keys.state) if keys.state else None,
            instructions=[next(filter(None, map(_decoded, np.ravel(texts))), "") for texts in said],
            file_path=_decoded(metadata.get("file_path", b"")),
        )
    notes = sentences(keys) + ["of several instructions a step the first that is not empty is taken"] * several
    notes += [f"its splits {', '.join(unused)} are not used"] * bool(unused)
    parts = keys.action if len(keys.action) > 1 else ()
    names = [name for name in parts for _ in range(_vector(fields, (name,)).shape[1])]
    writer.finish(train_episodes=splits["train"] if held_out else None, action_names=names, notes=notes)


def _stored_episodes(tfds: Any, builder: Any, split: str) -> Iterator[dict[str, Any]]:
    """The episodes in order, their steps as arrays, encoded images as bytes."""
    as_stored = {"steps": tfds.decode.SkipDecoding()}
    if builder.info.file_format.value == "array_record":  # tf.data doesn't read it
        yield from builder.as_data_source(split=split, decoders=as_stored)
        return
    in_order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    yield from tfds.as_numpy(
        builder.as_dataset(split=split, shuffle_files=False, decoders=as_stored, read_config=in_order)
    )


def _vector(fields: Mapping[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    """(T, D): one field, or several beside each other."""
    parts = [np.asarray(fields[name]) for name in names]
    return np.concatenate([part.reshape(len(part), math.prod(part.shape[1:])) for part in parts], axis=1)


def _decoded(text: Any) -> str:
    if isinstance(text, str):
        return text
    try:
        return bytes(text).decode()
    except UnicodeDecodeError:
        return bytes(text).decode("latin-1")


def _flat(nested: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full names, parts joined by "/", and what they stand for."""
    for name, value in nested.items():
        if hasattr(value, "items"):  # a dictionary, or a FeaturesDict of tfds
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _fields(tfds: Any, features: Any) -> dict[str, list[str]]:
    """Full names of the cameras, vectors and texts that the steps hold; texts of episode_metadata, too."""
    found: dict[str, list[str]] = {"camera": [], "vector": [], "text": []}
    steps = dict(_flat(features["steps"].feature)) if "steps" in features else {}
    metadata = {"episode_metadata": features["episode_metadata"]} if "episode_metadata" in features else {}
    for name, feature in [*steps.items(), *_flat(metadata)]:
        kind, shape = np.dtype(feature.np_dtype).kind, feature.shape or ()
        if isinstance(feature, tfds.features.Image) or (kind == "u" and len(shape) == 3):
            found["camera"] += [name] * (feature.np_dtype == np.uint8)  # others are depth
        elif kind in "OSU":
            found["text"].append(name)
        elif (kind in "fiu" and len(shape) == 1) or (kind in "bfiu" and len(shape) < 2 and "/" in name):
            found["vector"].append(name)
    return found


def _write(episodes: Path, folder: Path, name: str) -> None:
    """Write a version's files into folder with tfds' own writer."""
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    tfds.disable_progress_bar()
    dataset_name, paths = name, sorted(episodes.glob("*.npz"))

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset_name
        VERSION = tfds.core.Version(VERSION)
        RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "Initial release."}

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=_features(tfds, load_episode(paths[0])))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, Any]]:
            for path in tqdm(paths, desc=f"writing {dataset_name}", unit="episode"):
                yield path.stem, _example(path)

    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    place = folder / "tfds"  # where it also makes folders that nobody wants
    Builder(data_dir=place).download_and_prepare(download_config=offline)
    for file in (place / name / VERSION).iterdir():
        file.rename(folder / file.name)
    shutil.rmtree(place)


def _features(tfds: Any, first: StagedEpisode) -> Any:
    """The features of modified_libero_rlds, their descriptions included, as far as a staged episode has them, in its sizes."""
    feature, scalar = tfds.features, tfds.features.Scalar

    def image(jpeg: bytes, doc: str) -> Any:
        return feature.Image(shape=decode_jpeg(jpeg).shape, dtype=np.uint8, encoding_format="jpeg", doc=doc)

    def vector(values: np.ndarray, doc: str) -> Any:
        return feature.Tensor(shape=values.shape[1:], dtype=np.float32, doc=doc)

    observation = {"image": image(first.images[0], "Main camera RGB observation.")}
    if first.wrist_images:
        observation["wrist_image"] = image(first.wrist_images[0], "Wrist camera RGB observation.")
    if first.state is not None:
        observation["state"] = vector(first.state, "Robot EEF state (6D pose, 2D gripper).")
    if first.joint_state is not None:
        observation["joint_state"] = vector(first.joint_state, "Robot joint angles.")
    terminal = "True on last step of the episode if it is a terminal step, True for demos."
    step = {
        "observation": feature.FeaturesDict(observation),
        "action": vector(first.action, "Robot EEF action."),
        "discount": scalar(np.float32, doc="Discount if provided, default to 1."),
        "reward": scalar(np.float32, doc="Reward if provided, 1 on final step for demos."),
        "is_first": scalar(np.bool_, doc="True on first step of the episode."),
        "is_last": scalar(np.bool_, doc="True on last step of the episode."),
        "is_terminal": scalar(np.bool_, doc=terminal),
        "language_instruction": feature.Text(doc="Language Instruction."),
    }
    metadata = feature.FeaturesDict({"file_path": feature.Text(doc="Path to the original data file.")})
    return feature.FeaturesDict({"steps": feature.Dataset(step), "episode_metadata": metadata})


def _example(path: Path) -> dict[str, Any]:
    """A staged episode as tfds takes it: images as file objects, whose bytes it stores as they are."""
    episode = load_episode(path)
    last = len(episode.action) - 1
    views = {"image": episode.images, "wrist_image": episode.wrist_images}
    fields: dict[str, Any] = {name: [io.BytesIO(jpeg) for jpeg in jpegs] for name, jpegs in views.items() if jpegs}
    vectors = {"state": episode.state, "joint_state": episode.joint_state}
    fields |= {name: values for name, values in vectors.items() if values is not None}
    steps = [
        {
            "observation": {name: values[t] for name, values in fields.items()},
            "action": episode.action[t],
            "discount": 1.0,
            "reward": float(t == last),
            "is_first": t == 0,
            "is_last": t == last,
            "is_terminal": t == last,
            "language_instruction": episode.instruction,
        }
        for t in range(last + 1)
    ]
    return {"steps": steps, "episode_metadata": {"file_path": episode.file_path}}


def main() -> None:
    """The child: `read SOURCE FOLDER OPTIONS` or `write EPISODES FOLDER NAME`; answers on stdout what went wrong: kind, sentence, traceback."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT]):  # it died before we asked
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both: the parent ends us and tidies up
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # tfds prints there that it is "downloading"
    answer = ("", "", "")
    try:
        command, source, folder, more = sys.argv[1:]
        (_read if command == "read" else _write)(Path(source), Path(folder), more)
    except Exception as error:
        answer = (type(error).__name__, (str(error).splitlines() or [""])[0], traceback.format_exc())
    with answer_to:
        json.dump(answer, answer_to)


if __name__ == "__main__":
    main()
