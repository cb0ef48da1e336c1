"""Staged episodes → a LeRobot data set (v3.0) that the real library reads; images in parquet, as the JPEG bytes that they were staged as."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prismatic.data.lerobot_meta import CHUNK_FILES, COUNTERS, NUMBERED
from prismatic.data.made_once import made_of_staged
from prismatic.data.staging import StagedEpisode, load_episode
from prismatic.errors import ConfigError
from prismatic.filenames import LEROBOT_INFO
from prismatic.image import decode_jpeg
from prismatic.normalize import ACTION_DIMENSIONS

IMAGE, WRIST, STATE, ACTION = "observation.images.image", "observation.images.image2", "observation.state", "action"
EPISODES_A_FILE = 50  # about 100 MB, as the library writes them
SAMPLED_FRAMES = 100  # of the images' statistics
LIBERO_RATE = 20.0  # Hz, of LIBERO's controller


def write_dataset(episodes: Path, output: Path, name: str, *, fps: float = LIBERO_RATE) -> Path:
    """The staged episodes (`*.npz` in a folder) as LeRobot data set `output/name`, unless it holds just these.

    What an earlier call wrote is replaced. ConfigError where there is no episode, or a data set from elsewhere in the way.
    """
    return made_of_staged(episodes, Path(output).absolute() / name, functools.partial(_write, fps=fps), fps=fps)


def _write(folder: Path, paths: Sequence[Path], *, fps: float) -> None:
    """All files of it. Memory holds an episode at a time, and the numbers of all."""
    features = _features(load_episode(paths[0]))
    schema = _schema(features)
    tasks: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    samples: dict[str, list[np.ndarray]] = {name: [] for name in features if name not in COUNTERS}
    for file, first in enumerate(range(0, len(paths), EPISODES_A_FILE)):
        where = {"chunk_index": file // CHUNK_FILES, "file_index": file % CHUNK_FILES}
        place = _made(folder, f"data/{NUMBERED}.parquet".format(**where))
        with pq.ParquetWriter(place, schema, compression="snappy") as writer:  # a row group an episode
            for path in paths[first : first + EPISODES_A_FILE]:
                episode = load_episode(path)
                values, steps = _values(episode), len(episode.action)
                if _features(episode) != features or {len(column) for column in values.values()} != {steps}:
                    raise ConfigError(
                        f"{path} has images, actions or a state of unequal lengths, or of another form than the first episode's: delete it and go on"
                    )
                start = rows[-1]["dataset_to_index"] if rows else 0
                task = tasks.setdefault(episode.instruction, len(tasks))
                frame = np.arange(steps)
                counters = (frame / fps, frame, np.full(steps, len(rows)), start + frame, np.full(steps, task))
                writer.write_table(pa.table(values | dict(zip(COUNTERS, counters, strict=True)), schema=schema))
                for name in samples:
                    if features[name]["dtype"] == "float32":
                        samples[name].append(np.stack(values[name]))
                    elif len(samples[name]) < SAMPLED_FRAMES:
                        samples[name].append(decode_jpeg(values[name][steps // 2]["bytes"])[None])
                rows.append(
                    {
                        "episode_index": len(rows), "tasks": [episode.instruction], "length": steps,
                        **{f"data/{key}": value for key, value in where.items()},
                        "dataset_from_index": start, "dataset_to_index": start + steps,
                        "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0,
                    }
                )  # fmt: skip
    episodes = _made(folder, f"meta/episodes/{NUMBERED}.parquet".format(chunk_index=0, file_index=0))
    pq.write_table(pa.Table.from_pylist(rows), episodes)
    texts = pa.table({"task_index": list(tasks.values()), "task": list(tasks)})
    pq.write_table(texts.replace_schema_metadata({"pandas": json.dumps(_PANDAS)}), folder / "meta/tasks.parquet")
    info = {
        "codebase_version": "v3.0", "robot_type": None, "total_episodes": len(rows), "total_frames": rows[-1]["dataset_to_index"],
        "total_tasks": len(tasks), "chunks_size": CHUNK_FILES, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200,
        "fps": int(fps) if fps == int(fps) else fps, "splits": {"train": f"0:{len(rows)}"},
        "data_path": f"data/{NUMBERED}.parquet", "video_path": None, "features": features,
    }  # fmt: skip
    (folder / LEROBOT_INFO).write_text(json.dumps(info, indent=4))
    stats = {name: _statistics(np.concatenate(parts)) for name, parts in samples.items()}
    (folder / "meta/stats.json").write_text(json.dumps(stats, indent=4))


def _made(folder: Path, name: str) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    return folder / name


def _features(first: StagedEpisode) -> dict[str, dict[str, Any]]:
    """As info.json has them."""
    views = {IMAGE: first.images, WRIST: first.wrist_images}
    shapes = {name: decode_jpeg(jpegs[0]).shape for name, jpegs in views.items() if jpegs}
    features: dict[str, dict[str, Any]] = {
        name: {"dtype": "image", "shape": list(shape), "names": ["height", "width", "channel"]}
        for name, shape in shapes.items()
    }
    for name, vectors in ((ACTION, first.action), (STATE, first.state)):
        if vectors is not None:
            seven = (name, vectors.shape[1]) == (ACTION, len(ACTION_DIMENSIONS))
            names = list(ACTION_DIMENSIONS) if seven else [name]
            features[name] = {"dtype": "float32", "shape": [vectors.shape[1]], "names": names}
    return features | {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in COUNTERS.items()}


def _schema(features: dict[str, dict[str, Any]]) -> pa.Schema:
    """The columns, and how the library of data sets is told of them."""
    columns: dict[str, pa.DataType] = {}
    told: dict[str, Any] = {}
    for name, feature in features.items():
        value = {"dtype": feature["dtype"], "_type": "Value"}
        if feature["dtype"] == "image":
            columns[name], told[name] = pa.struct([("bytes", pa.binary()), ("path", pa.string())]), {"_type": "Image"}
        elif name in COUNTERS:
            columns[name], told[name] = getattr(pa, feature["dtype"])(), value
        else:
            columns[name] = pa.list_(pa.float32(), feature["shape"][0])
            told[name] = {"feature": value, "length": feature["shape"][0], "_type": "List"}
    return pa.schema(list(columns.items()), metadata={"huggingface": json.dumps({"info": {"features": told}})})


def _values(episode: StagedEpisode) -> dict[str, list[Any]]:
    """Images and vectors, a value a row."""
    values: dict[str, list[Any]] = {}
    for name, jpegs in ((IMAGE, episode.images), (WRIST, episode.wrist_images)):
        values[name] = [{"bytes": jpeg, "path": f"frame-{t:06d}.jpg"} for t, jpeg in enumerate(jpegs)]
    for name, vectors in ((ACTION, episode.action), (STATE, episode.state)):
        values[name] = [] if vectors is None else list(np.asarray(vectors, dtype=np.float32))
    return {name: rows for name, rows in values.items() if rows}


def _statistics(values: np.ndarray) -> dict[str, Any]:
    """Of vectors (N, D), from all rows; of images (N, H, W, 3), 0 … 1 per channel (3, 1, 1), from a frame of each of the first episodes."""
    is_image = values.ndim == 4
    values = values.astype(np.float64) / (255 if is_image else 1)
    axes = (0, 1, 2) if is_image else (0,)
    found = {"min": values.min(axes), "max": values.max(axes), "mean": values.mean(axes), "std": values.std(axes)}
    shape = (3, 1, 1) if is_image else (-1,)
    return {key: value.reshape(shape).tolist() for key, value in found.items()} | {"count": [len(values)]}


def _column(name: str, kind: str, dtype: str) -> dict[str, Any]:
    return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype, "metadata": None}


# tasks.parquet is read by pandas there, and the text is its index
_PANDAS = {
    "index_columns": ["task"],
    "column_indexes": [_column("", "unicode", "object") | {"name": None, "field_name": None}],
    "columns": [_column("task_index", "int64", "int64"), _column("task", "unicode", "object")],
    "pandas_version": "2.2.3",
}
