"""RLDS data sets in the layout of modified_libero_rlds: staged episodes → data set; data set → frame cache.

The only user of TensorFlow, which crashes beside triton, torchvision or an osmesa context: both functions
start `python -m prismatic.data.rlds` as a child that imports it, and what goes wrong there comes back as a
ConfigError. No image is decoded or encoded: a frame's JPEG bytes stay the same from its first writing to the
training batch. What is half-written lies in a hidden folder beside the target and is renamed when it is
whole.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from prismatic.data.dataset_folder import AGAIN, check_whole, dataset_name, find_dataset, listing
from prismatic.data.frames import CACHE_FORMAT
from prismatic.data.staging import ACTION_SIZE, JOINTS, STATE_SIZE, load_episode, stage_episode, writing_to
from prismatic.errors import ConfigError
from prismatic.filenames import CACHE_FRAMES, CACHE_META, CACHE_STEPS

__all__ = ["build_cache", "find_dataset", "stage_episode", "write_dataset"]

VERSION = "1.0.0"  # of every data set that we write
IMAGE_SHAPE = (256, 256, 3)
JPEG_START = b"\xff\xd8"
VIEWS = ("image", "wrist_image")  # their order in frames.bin; the second may be missing
STAGED_NOTE = ".staged.json"  # in a version folder that write_dataset made: the episodes that it was made of
REMEDIES = {"No space left": "free some space or give another folder", "DataLossError": AGAIN}
CHILD_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",  # a TensorFlow with GPU support would take the whole GPU
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",  # otherwise it prints a notice at each start
}


def build_cache(rlds_dir: Path, cache_dir: Path) -> Path:
    """The frame cache of an RLDS data set (its version folder) under `cache_dir`, made now if it isn't there.

    A data set whose files changed since (name, size, time) gets a new one. ConfigError for a folder that is
    no such data set, is damaged, or lacks one of image, action and language_instruction.
    """
    source, cache_dir = Path(rlds_dir).absolute(), Path(cache_dir).absolute()  # a link keeps its own name
    if not source.is_dir():
        raise ConfigError(f"the RLDS data set {source} doesn't exist: give a version folder, such as …/1.0.0")
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, listing(source.iterdir())]).encode()).hexdigest()
    cache = cache_dir / f"{dataset_name(source)}-{key[:12]}"
    if (cache / CACHE_META).is_file():
        return cache
    check_whole(source)
    with _unfinished(cache_dir) as folder:
        _in_child(f"reading {source}", "read", source, folder)
        with writing_to(cache_dir):
            try:
                folder.rename(cache)
            except OSError:
                if not (cache / CACHE_META).is_file():  # else another process was quicker: its is as good
                    raise
    return cache


def check_name(name: str) -> None:
    """ConfigError where tfds would not take it as a data set's name."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(
            f"{name!r} can't name a data set (dataset_name): use small letters, digits and _, a letter first"
        )


def write_dataset(episodes: Path, output: Path, name: str) -> Path:
    """The staged episodes (`*.npz` in a folder) as RLDS data set `output/name/1.0.0`, unless it holds just
    these.

    Their order on disk goes by a hash of the files' names, as always with tfds. What an earlier call wrote is
    replaced. ConfigError where there is no episode, or a data set from elsewhere in the way.
    """
    episodes, target = Path(episodes).absolute(), Path(output).absolute() / name / VERSION
    check_name(name)
    note = json.dumps(listing(episodes.glob("*.npz")))
    if note == "[]":
        raise ConfigError(f"{episodes} holds no finished episode (*.npz): collect at least one first")
    if target.exists():
        if not (target / STAGED_NOTE).is_file():
            raise ConfigError(f"{target} is a data set from elsewhere and is kept: give another output or name")
        if (target / STAGED_NOTE).read_text() == note:
            return target
    with _unfinished(target.parent) as folder:
        _in_child(f"writing {target}", "write", episodes, folder, name)
        with writing_to(target.parent):
            (folder / name / VERSION / STAGED_NOTE).write_text(note)
            if target.exists():
                target.rename(folder / "replaced")
            (folder / name / VERSION).rename(target)
    return target


@contextlib.contextmanager
def _unfinished(parent: Path) -> Iterator[Path]:
    """A new folder inside a hidden one in `parent`, which goes away in the end, whatever happens."""
    with writing_to(parent):
        parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=parent))
        folder = hidden / "new"
        folder.mkdir()  # with the usual permissions, unlike the hidden one
    try:
        yield folder
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _in_child(doing: str, *arguments: str | Path) -> None:
    """Run `main` below in a new process. It answers one JSON object; its progress bar goes to our stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "prismatic.data.rlds", *map(str, arguments)],
        cwd=Path(__file__).resolve().parents[2],  # where it finds this package
        env=os.environ | CHILD_ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0 or not done.stdout:
        hint = ", perhaps for want of memory" if done.returncode == -signal.SIGKILL else ""
        raise ConfigError(f"{doing} failed, its process ended with code {done.returncode}{hint}: start it again")
    answer = json.loads(done.stdout)
    if "config_error" in answer:
        raise ConfigError(answer["config_error"])
    if "failure" in answer:
        remedy = next((do for sign, do in REMEDIES.items() if sign in answer["failure"]), "nothing was changed")
        raise ConfigError(f"{doing} failed ({answer['failure']}): {remedy}") from RuntimeError(answer["trace"])


# From here on: the child.


def _read(source: Path, folder: Path) -> None:
    """Stream the data set into the cache's three files; a few episodes' images are in memory at a time."""
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    builder: Any = tfds.builder_from_directory(source)
    views, has_state = _check_features(builder.info.features, source)
    splits = {name: split.num_examples for name, split in builder.info.splits.items() if name in ("train", "val")}
    if "train" not in splits:
        raise ConfigError(f"{source} has no split named train, only {list(builder.info.splits)}: rename one")
    as_stored = {"steps": tfds.decode.SkipDecoding()}  # an episode as arrays, its images as bytes
    in_order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)

    columns: dict[str, list[np.ndarray]] = {"action": [], "episode": [], "timestep": [], "instruction": []}
    columns |= {"state": []} if has_state else {}
    sizes: list[int] = []
    words: dict[str, int] = {}
    file_paths: list[str] = []
    content = hashlib.blake2b(digest_size=16)
    bar = tqdm(total=sum(splits.values()), desc=f"reading {dataset_name(source)}", unit="episode")
    with (folder / CACHE_FRAMES).open("wb") as frames, bar:
        for split in sorted(splits):  # train, then val
            stored = builder.as_dataset(split=split, shuffle_files=False, decoders=as_stored, read_config=in_order)
            for example in tfds.as_numpy(stored):
                steps, observation = example["steps"], example["steps"]["observation"]
                number, length = len(file_paths), len(steps["action"])
                jpegs = [jpeg for both in zip(*map(observation.get, views), strict=True) for jpeg in both]
                said = [text.decode() for text in steps["language_instruction"]]
                _check_episode(jpegs, steps["action"], f"episode {number + 1} of {source}")
                columns["action"].append(steps["action"].astype(np.float32))
                if has_state:
                    columns["state"].append(observation["state"].astype(np.float32))
                columns["episode"].append(np.full(length, number, dtype=np.int32))
                columns["timestep"].append(np.arange(length, dtype=np.int32))
                numbers = [words.setdefault(text, len(words)) for text in said]
                columns["instruction"].append(np.array(numbers, dtype=np.int32))
                file_paths.append(example.get("episode_metadata", {}).get("file_path", b"").decode())
                sizes.extend(map(len, jpegs))
                frames.write(b"".join(jpegs))
                for piece in (*jpegs, columns["action"][-1].tobytes(), "\0".join(said).encode()):
                    content.update(piece)
                bar.update()
    arrays = {key: np.concatenate(parts) for key, parts in columns.items()}
    np.savez(folder / CACHE_STEPS, allow_pickle=False, offsets=np.cumsum([0, *sizes]), **arrays)
    meta = {
        "format": CACHE_FORMAT,
        "name": dataset_name(source),
        "source": str(source),
        "fingerprint": content.hexdigest(),
        "train_episodes": splits["train"] if "val" in splits else None,  # None: the first 95 %
        "images": views,
        "instructions": list(words),
        "file_paths": file_paths,
    }
    (folder / CACHE_META).write_text(json.dumps(meta, indent=1))


def _check_features(features: Any, source: Path) -> tuple[list[str], bool]:
    """The views that there are, and whether there is a state; ConfigError names missing fields."""
    steps = features["steps"] if "steps" in features else {}  # noqa: SIM401  (these have no get)
    observation = steps["observation"] if "observation" in steps else {}  # noqa: SIM401
    needed = {"observation/image": "image" in observation}
    needed |= {field: field in steps for field in ("action", "language_instruction")}
    missing = ", ".join(f"steps/{field}" for field, there in needed.items() if not there)
    if missing:
        raise ConfigError(f"{source} lacks {missing}: give a data set in the layout of modified_libero_rlds")
    shape = steps["action"].shape
    if shape != (ACTION_SIZE,):
        raise ConfigError(f"steps/action of {source} has shape {shape}: give one with ({ACTION_SIZE},)")
    return [view for view in VIEWS if view in observation], "state" in observation


def _check_episode(jpegs: list[bytes], actions: np.ndarray, where: str) -> None:
    if not np.isfinite(actions).all():
        raise ConfigError(f"steps/action of {where} holds NaN or infinity: repair or drop that episode")
    if not all(jpeg.startswith(JPEG_START) for jpeg in jpegs):
        raise ConfigError(f"steps/observation of {where} holds an image that is no JPEG: store it as JPEG")


def _write(episodes: Path, folder: Path, name: str) -> None:
    """Write `folder/name/1.0.0` with tfds' own writer."""
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    tfds.disable_progress_bar()
    dataset_name = name

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset_name
        VERSION = tfds.core.Version(VERSION)
        RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "Initial release."}

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=_features(tfds))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, Any]]:
            for path in tqdm(sorted(episodes.glob("*.npz")), desc=f"writing {dataset_name}", unit="episode"):
                yield path.stem, _example(path)

    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    Builder(data_dir=folder).download_and_prepare(download_config=offline)


def _features(tfds: Any) -> Any:
    """The features of modified_libero_rlds, their descriptions included."""
    feature = tfds.features

    def image(doc: str) -> Any:
        return feature.Image(shape=IMAGE_SHAPE, dtype=np.uint8, encoding_format="jpeg", doc=doc)

    def vector(size: int, doc: str) -> Any:
        return feature.Tensor(shape=(size,), dtype=np.float32, doc=doc)

    def scalar(dtype: type, doc: str) -> Any:
        return feature.Scalar(dtype=dtype, doc=doc)

    observation = {
        "image": image("Main camera RGB observation."),
        "wrist_image": image("Wrist camera RGB observation."),
        "state": vector(STATE_SIZE, "Robot EEF state (6D pose, 2D gripper)."),
        "joint_state": vector(JOINTS, "Robot joint angles."),
    }
    terminal = "True on last step of the episode if it is a terminal step, True for demos."
    step = {
        "observation": feature.FeaturesDict(observation),
        "action": vector(ACTION_SIZE, "Robot EEF action."),
        "discount": scalar(np.float32, "Discount if provided, default to 1."),
        "reward": scalar(np.float32, "Reward if provided, 1 on final step for demos."),
        "is_first": scalar(np.bool_, "True on first step of the episode."),
        "is_last": scalar(np.bool_, "True on last step of the episode."),
        "is_terminal": scalar(np.bool_, terminal),
        "language_instruction": feature.Text(doc="Language Instruction."),
    }
    metadata = feature.FeaturesDict({"file_path": feature.Text(doc="Path to the original data file.")})
    return feature.FeaturesDict({"steps": feature.Dataset(step), "episode_metadata": metadata})


def _example(path: Path) -> dict[str, Any]:
    """A staged episode as tfds takes it: images as file objects, whose bytes it stores as they are."""
    episode = load_episode(path)
    last = len(episode.action) - 1
    steps = [
        {
            "observation": {
                "image": io.BytesIO(episode.images[t]),
                "wrist_image": io.BytesIO(episode.wrist_images[t]),
                "state": episode.state[t],
                "joint_state": episode.joint_state[t],
            },
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
    """The child: `read SOURCE FOLDER` or `write EPISODES FOLDER NAME`; answers one JSON object on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both: the parent ends us and tidies up
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # tfds prints there that it is "downloading"
    answer: dict[str, str] = {}
    try:
        command, source, folder, *rest = sys.argv[1:]
        (_read if command == "read" else _write)(Path(source), Path(folder), *rest)
    except ConfigError as error:
        answer = {"config_error": str(error)}
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        answer = {"failure": f"{type(error).__name__}: {first_line}", "trace": traceback.format_exc()}
    json.dump(answer, answer_to)
    answer_to.close()


if __name__ == "__main__":
    main()
