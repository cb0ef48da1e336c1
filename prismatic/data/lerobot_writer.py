"""Staged episodes → a LeRobot data set (v3.0) that the real library reads; images in parquet, as the JPEG bytes that they were staged as."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prismatic.data.dataset_folder import listing
from prismatic.data.staging import StagedEpisode, load_episode, writing_to
from prismatic.data.writer import unfinished
from prismatic.errors import ConfigError
from prismatic.filenames import LEROBOT_INFO, STAGED_NOTE
from prismatic.image import decode_jpeg
from prismatic.normalize import ACTION_DIMENSIONS

IMAGE, WRIST, STATE, ACTION = "observation.images.image", "observation.images.image2", "observation.state", "action"
COUNTERS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
FILE_BYTES = 100_000_000  # after which the next data file begins
CHUNK_FILES = 1000
SAMPLED_FRAMES = 100  # of the images' statistics
LIBERO_RATE = 20.0  # Hz, of LIBERO's controller


def write_dataset(episodes: Path, output: Path, name: str, *, fps: float = LIBERO_RATE) -> Path:
    """The staged episodes (`*.npz` in a folder) as LeRobot data set `output/name`, unless it holds just these.

    What an earlier call wrote is replaced. ConfigError where there is no episode, or a data set from elsewhere in the way.
    """
    episodes, target = Path(episodes).absolute(), Path(output).absolute() / name
    paths = sorted(episodes.glob("*.npz"))
    note = json.dumps([fps, listing(paths)])
    if not paths:
        raise ConfigError(f"{episodes} holds no finished episode (*.npz): collect at least one first")
    if target.exists():
        if not (target / STAGED_NOTE).is_file():
            raise ConfigError(f"{target} is a data set from elsewhere and is kept: give another output or name")
        if (target / STAGED_NOTE).read_text() == note:
            return target
    with unfinished(target.parent) as folder, writing_to(target.parent):
        _Writer(folder, load_episode(paths[0]), fps).write(paths)
        (folder / STAGED_NOTE).write_text(note)
        if target.exists():
            target.rename(folder.parent / "replaced")
        folder.rename(target)
    return target


class _Writer:
    """One data set. Memory holds an episode at a time."""

    def __init__(self, folder: Path, first: StagedEpisode, fps: float) -> None:
        self._folder, self._fps = folder, fps
        self._views = {IMAGE: first.images, **({WRIST: first.wrist_images} if first.wrist_images else {})}
        self._vectors = {ACTION: first.action, **({STATE: first.state} if first.state is not None else {})}
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._numbers: dict[str, list[np.ndarray]] = {name: [] for name in self._vectors}
        self._pixels: dict[str, list[np.ndarray]] = {name: [] for name in self._views}

    def write(self, paths: Sequence[Path]) -> None:
        """All files of it."""
        file, writer = -1, None
        for number, path in enumerate(paths):
            if writer is None:
                file += 1
                place = self._path("data", file)
                place.parent.mkdir(parents=True, exist_ok=True)
                writer = pq.ParquetWriter(place, self._schema(), compression="snappy")
            writer.write_table(self._table(load_episode(path), path, number, file))  # a row group an episode
            if self._path("data", file).stat().st_size > FILE_BYTES or number == len(paths) - 1:
                writer.close()
                writer = None
        self._write_meta(frames=sum(row["length"] for row in self._episodes))

    def _path(self, room: str, file: int) -> Path:
        return self._folder / room / f"chunk-{file // CHUNK_FILES:03d}" / f"file-{file % CHUNK_FILES:03d}.parquet"

    def _schema(self) -> pa.Schema:
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns: dict[str, pa.DataType] = dict.fromkeys(self._views, image)
        features: dict[str, Any] = {name: {"_type": "Image"} for name in self._views}
        for name, values in self._vectors.items():
            columns[name] = pa.list_(pa.float32(), values.shape[1])
            features[name] = {
                "feature": {"dtype": "float32", "_type": "Value"},
                "length": values.shape[1],
                "_type": "List",
            }
        for name, dtype in COUNTERS.items():
            columns[name] = pa.float32() if dtype == "float32" else pa.int64()
            features[name] = {"dtype": dtype, "_type": "Value"}
        huggingface = json.dumps({"info": {"features": features}})
        return pa.schema(list(columns.items()), metadata={"huggingface": huggingface})

    def _table(self, episode: StagedEpisode, path: Path, number: int, file: int) -> pa.Table:
        steps, start = len(episode.action), sum(row["length"] for row in self._episodes)
        views = {IMAGE: episode.images, WRIST: episode.wrist_images}
        vectors = {ACTION: episode.action, STATE: episode.state}
        for name, first in self._vectors.items():
            if np.shape(vectors[name])[1:] != first.shape[1:] or len(views[IMAGE]) != steps:
                raise ConfigError(
                    f"{name} of the staged episode {path} has another shape than the first's: delete it and go on"
                )
        task = self._tasks.setdefault(episode.instruction, len(self._tasks))
        frame = np.arange(steps)
        columns: dict[str, Any] = {
            name: [{"bytes": jpeg, "path": f"frame-{t:06d}.jpg"} for t, jpeg in enumerate(views[name])]
            for name in self._views
        }
        for name in self._vectors:
            columns[name] = list(np.asarray(vectors[name], dtype=np.float32))
            self._numbers[name].append(np.asarray(vectors[name], dtype=np.float32))
        counters = (frame / self._fps, frame, np.full(steps, number), start + frame, np.full(steps, task))
        columns |= dict(zip(COUNTERS, counters, strict=True))
        for name in self._views:
            if len(self._pixels[name]) < SAMPLED_FRAMES:
                self._pixels[name].append(decode_jpeg(views[name][steps // 2]))
        self._episodes.append(
            {
                "episode_index": number, "tasks": [episode.instruction], "length": steps, "data/chunk_index": file // CHUNK_FILES,
                "data/file_index": file % CHUNK_FILES, "dataset_from_index": start, "dataset_to_index": start + steps,
                "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0,
            }
        )  # fmt: skip
        return pa.table(columns, schema=self._schema())

    def _write_meta(self, *, frames: int) -> None:
        episodes = self._path("meta/episodes", 0)
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), episodes)
        tasks = pa.table({"task_index": list(self._tasks.values()), "task": list(self._tasks)})
        pq.write_table(
            tasks.replace_schema_metadata({"pandas": json.dumps(_PANDAS)}), self._folder / "meta/tasks.parquet"
        )
        features: dict[str, Any] = {}
        for name in self._views:
            shape = list(self._pixels[name][0].shape)
            features[name] = {"dtype": "image", "shape": shape, "names": ["height", "width", "channel"]}
        for name, values in self._vectors.items():
            names = list(ACTION_DIMENSIONS) if (name, values.shape[1]) == (ACTION, len(ACTION_DIMENSIONS)) else None
            features[name] = {"dtype": "float32", "shape": [values.shape[1]], "names": names or [name]}
        features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in COUNTERS.items()}
        info = {
            "codebase_version": "v3.0", "robot_type": None, "total_episodes": len(self._episodes), "total_frames": frames,
            "total_tasks": len(self._tasks), "chunks_size": CHUNK_FILES, "data_files_size_in_mb": FILE_BYTES // 10**6,
            "video_files_size_in_mb": 200, "fps": int(self._fps) if self._fps == int(self._fps) else self._fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", "video_path": None, "features": features,
        }  # fmt: skip
        (self._folder / LEROBOT_INFO).write_text(json.dumps(info, indent=4))
        (self._folder / "meta/stats.json").write_text(json.dumps(dict(self._statistics()), indent=4))

    def _statistics(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Of vectors, from all rows; of images, 0 … 1 per channel, from one frame of each of the first episodes."""
        for name, parts in self._numbers.items():
            yield name, _summary(np.concatenate(parts).astype(np.float64), (0,))
        for name, frames in self._pixels.items():
            unit = np.stack(frames).astype(np.float64) / 255
            found = _summary(unit, (0, 1, 2))
            yield (
                name,
                {
                    key: values if key == "count" else np.reshape(values, (3, 1, 1)).tolist()
                    for key, values in found.items()
                },
            )


def _summary(values: np.ndarray, axes: tuple[int, ...]) -> dict[str, Any]:
    found = {"min": values.min(axes), "max": values.max(axes), "mean": values.mean(axes), "std": values.std(axes)}
    return {key: value.tolist() for key, value in found.items()} | {"count": [len(values)]}


# tasks.parquet is read by pandas there, and the text is its index
_PANDAS = {
    "index_columns": ["task"],
    "column_indexes": [
        {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    ],
    "columns": [
        {
            "name": "task_index",
            "field_name": "task_index",
            "pandas_type": "int64",
            "numpy_type": "int64",
            "metadata": None,
        },
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
    ],
    "pandas_version": "2.2.3",
}
