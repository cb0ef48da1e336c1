"""Every kind of file that the project reads, damaged in every way: what becomes of each try, as a table.

    python -m tests.hostile_inputs

refused: one sentence. equal: read as if nothing were wrong. plausible: read as another value within its limits, which no check can tell from
a right one in a file without sums. wrong: the same in a file that has sums. traceback: anything else that was raised.
"""

import copy
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from prismatic import evaluation, report
from prismatic.adapter_config import read_adapter_config
from prismatic.data import dataset_folder, lerobot
from prismatic.data.frames import FrameCache
from prismatic.data.lerobot_meta import LeRobotFolder
from prismatic.data.staging import load_episode, stage_episode
from prismatic.dataset_statistics import check_entry, load_statistics
from prismatic.episodes.result import load_actions, read_run
from prismatic.errors import ConfigError
from prismatic.filenames import WEIGHTS
from prismatic.models.config_file import read_config
from prismatic.models.weights import stored_tensors
from prismatic.processor_files import load_tokenizer
from prismatic.processor_json import read_processor
from prismatic.sums import read_sums, write_sums
from prismatic.training import curves
from tests.conftest import REPOSITORY
from tests.drawn_cache import write_cache
from tests.drawn_results import folder_with, row

TINY = REPOSITORY / "checkpoints" / "openvla-tiny"
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3, 2**63, 10**400, 1.5, -1e308, 1e308, float("nan"), float("inf"), "", "x", "../x", "\ud800", "x" * 5000,
    [], [None], [[]], {}, {"a": 1},
)  # fmt: skip
WHOLE = (b"", b"null", b"[]", b"3", b'"x"', b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe\x00", b"\x80\x04K\x01.",
         b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"\0" * 4096)  # fmt: skip
FLIPS = 12  # of a file


@dataclass(frozen=True)
class Kind:
    """A file within a folder, how the folder is made, and what its reader makes of it, as something that can be compared."""

    file: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    has_sums: bool = False

    def __str__(self) -> str:
        return self.file


def same(value: Any) -> str:
    """A value as a text that is equal where the value is."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{value.tobytes()!r}"
    if isinstance(value, dict):
        return str(sorted((str(key), same(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return str([same(item) for item in value])
    return repr(value)


def copied(source: Path, *names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)

    return make


def written(name: str, content: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines = content if isinstance(content, list) else [content]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    return make


def make_weights(folder: Path) -> None:
    copied(TINY, WEIGHTS)(folder)
    write_sums(folder, [folder / WEIGHTS])


def read_weights(folder: Path) -> Any:
    stored = stored_tensors(folder)
    return {name: tensor.load(name, dtype=torch.float64).sum().item() for name, tensor in stored.items()}


def read_statistics(folder: Path) -> Any:
    found = load_statistics(folder)
    for key in found:
        check_entry(found[key], key, state=False)
    return found


def read_cache(folder: Path) -> Any:
    cache = FrameCache(folder)
    return [cache.step(frame) for frame in range(len(cache))], cache.statistics, cache.instructions


def read_actions(folder: Path) -> Any:
    found = load_actions(folder, "actions.npz")
    if found is None:
        raise ConfigError("a report does without")
    return found


ROWS = [row(0, 0, True), row(0, 1, False, verdict="missed"), row(1, 0, None, "crashed")]
STAGED: dict[str, Any] = {
    "images": [b"\xff\xd8one\xff\xd9", b"\xff\xd8two\xff\xd9"], "action": np.arange(14.0).reshape(2, 7), "state": np.ones((2, 8)),
    "instruction": "go", "file_path": "here",
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj"], "bias": "none",
    "init_lora_weights": True, "rank_pattern": {}, "layers_to_transform": None,
}  # fmt: skip
LEROBOT = {
    "codebase_version": "v2.1", "fps": 10, "chunks_size": 1000, "splits": {"train": "0:2"},
    "features": {"action": {"dtype": "float32", "shape": [7], "names": None}},
}  # fmt: skip


def read_lerobot(folder: Path) -> Any:
    dataset = LeRobotFolder(folder)
    dataset.check_lengths({0: 3, 1: 4})
    said = (dataset.version, dataset.fps, dataset.train_episodes(2), dataset.fields({}), dataset.tasks())
    return said, dataset.dimension_names([*dataset.features])


def read_rows(folder: Path) -> Any:
    dataset = LeRobotFolder(folder)
    rows = lerobot.read_rows(dataset, ["action"])
    return rows._replace(files=[]), dataset.tasks(), dataset.video_places("camera", [0, 1])


def make_lerobot(folder: Path) -> None:
    written("meta/info.json", LEROBOT)(folder)
    written("meta/tasks.jsonl", [{"task_index": 0, "task": "go"}, {"task_index": 1, "task": "stop"}])(folder)
    written("meta/episodes.jsonl", [{"episode_index": 0, "length": 3}, {"episode_index": 1, "length": 4}])(folder)


def make_lerobot_3(folder: Path) -> None:
    written("meta/info.json", LEROBOT | {"codebase_version": "v3.0"})(folder)
    place = {f"videos/camera/{part}": [0, 0] for part in ("chunk_index", "file_index", "from_timestamp")}
    tables = {
        "meta/tasks.parquet": {"task_index": [0, 1], "task": ["go", "stop"]},
        "meta/episodes/a.parquet": {"episode_index": [0, 1], "length": [1, 2], **place},
        "data/a.parquet": {"action": [[1.0, 2.0]] * 3, "episode_index": [0, 1, 1], "frame_index": [0, 0, 1]},
    }
    for name, columns in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / name)


def make_rlds(folder: Path) -> None:
    written("features.json", {"pythonClassName": "FeaturesDict"})(folder)
    written("dataset_info.json", {"name": "a", "splits": [{"name": "train", "shardLengths": ["2"]}]})(folder)
    episode = (5).to_bytes(8, "little") + b"sum.hello" + b"sum."
    (folder / "a-train.tfrecord-00000-of-00001").write_bytes(2 * episode)


def make_cache(folder: Path) -> None:
    folder.rmdir()
    write_cache(folder, [STAGED, STAGED | {"instruction": "stop"}])


KINDS = (
    Kind("results.jsonl", lambda folder: folder_with(folder, ROWS), evaluation.read_rows),
    Kind("summary.json", lambda folder: folder_with(folder, ROWS), lambda folder: report.build(folder).read_bytes()),
    Kind("run.json", written("run.json", {"identity": {"a": 1}, "record": {"sessions": [{}]}}), read_run),
    Kind("metrics.jsonl", written("metrics.jsonl", [{"step": s, "loss": 1 / s, "l1_loss": 0.1} for s in (1, 2, 3)]), curves.draw),
    Kind("config.json", copied(TINY, "config.json"), lambda folder: read_config(folder / "config.json")),
    Kind("processor.json", copied(TINY, "processor.json"), lambda folder: read_processor(folder / "processor.json")),
    Kind("dataset_statistics.json", copied(TINY, "dataset_statistics.json"), read_statistics),
    Kind("adapter_config.json", written("adapter_config.json", ADAPTER), lambda folder: read_adapter_config(folder, ["q_proj"])),
    Kind("tokenizer.json", copied(TINY, "tokenizer.json"), lambda folder: load_tokenizer(folder)("pick up").input_ids),
    Kind("SHA256SUMS", make_weights, read_sums),
    Kind("model.safetensors", make_weights, read_weights, has_sums=True),
    Kind("meta.json", make_cache, read_cache, has_sums=True),
    Kind("steps.npz", make_cache, read_cache, has_sums=True),
    Kind("frames.bin", make_cache, read_cache, has_sums=True),
    Kind("staged.npz", lambda folder: stage_episode(folder / "staged.npz", **STAGED), lambda folder: load_episode(folder / "staged.npz"), True),
    Kind("actions.npz", lambda folder: np.savez_compressed(folder / "actions.npz", actions=np.ones((9, 7), np.float32)), read_actions, True),
    Kind("meta/info.json", make_lerobot, read_lerobot),
    Kind("meta/tasks.jsonl", make_lerobot, read_lerobot),
    Kind("meta/episodes.jsonl", make_lerobot, read_lerobot),
    Kind("meta/tasks.parquet", make_lerobot_3, read_rows),
    Kind("meta/episodes/a.parquet", make_lerobot_3, read_rows),
    Kind("data/a.parquet", make_lerobot_3, read_rows),
    Kind("dataset_info.json", make_rlds, dataset_folder.check_whole),
)  # fmt: skip


def fields(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in nested lists and objects; of a list its first."""
    if path:
        yield path
    items = (
        content.items() if isinstance(content, dict) else enumerate(content[:1]) if isinstance(content, list) else ()
    )
    for key, item in items:
        yield from fields(item, (*path, key))


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    content = copy.deepcopy(content)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


def damages(good: bytes, chance: random.Random, name: str, most: int) -> Iterator[bytes]:
    """The file's content, damaged: cut off, a bit flipped, something else in its place, and in JSON odd values at fields, `most` in all."""
    yield from (good[: len(good) * part // 5] for part in range(1, 5))
    yield good[:-1]
    yield good + b"\0"
    for _ in range(FLIPS):
        place = chance.randrange(len(good))
        yield good[:place] + bytes([good[place] ^ (1 << chance.randrange(8))]) + good[place + 1 :]
    yield from WHOLE
    if name.endswith(("json", "jsonl")) and len(good) < 100_000:
        first, newline, rest = good.partition(b"\n") if name.endswith("jsonl") else (good, b"", b"")
        content = json.loads(first)
        places = list(fields(content))
        tries = [(path, value) for path in places for value in ODD]
        for path, value in chance.sample(tries, min(most, len(tries))):
            yield json.dumps(changed(content, path, value)).encode() + newline + rest


def outcome(kind: Kind, folder: Path, expected: str) -> str:
    try:
        found = same(kind.read(folder))
    except ConfigError as error:
        return "refused" if "\n" not in str(error) else "traceback: a sentence of several lines"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {str(error)[:80]}"
    return "equal" if found == expected else "wrong" if kind.has_sums else "plausible"


def tried(kind: Kind, most: int = 300) -> Counter[str]:
    """How often each came of a kind's damages."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "folder"
        folder.mkdir()
        kind.make(folder)
        path, expected = folder / kind.file, same(kind.read(folder))
        good = path.read_bytes()
        for content in damages(good, random.Random(0), kind.file, most):
            path.write_bytes(content)
            counts[outcome(kind, folder, expected)] += 1
        for become in (os.mkfifo, Path.mkdir, lambda path: Path(path).symlink_to("/dev/zero"), lambda path: None):
            path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
            become(path)
            counts[outcome(kind, folder, expected)] += 1
    return counts


def main() -> None:
    columns = ("refused", "equal", "plausible", "wrong", "traceback")
    print("| file | tried | " + " | ".join(columns) + " |\n|" + "---|" * (2 + len(columns)))
    total: Counter[str] = Counter()
    for kind in KINDS:
        counts = tried(kind)
        total += counts
        numbers = (sum(n for what, n in counts.items() if what.startswith(column)) for column in columns)
        print(f"| {kind} | {counts.total()} | " + " | ".join(map(str, numbers)) + " |", flush=True)
        for what, number in counts.items():
            if what.startswith(("traceback", "wrong")):
                print(f"    {number} x {what}", flush=True)
    numbers = (sum(n for what, n in total.items() if what.startswith(column)) for column in columns)
    print(f"| all | {total.total()} | " + " | ".join(map(str, numbers)) + " |")


if __name__ == "__main__":
    main()
