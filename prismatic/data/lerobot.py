"""LeRobot data sets (formats v2.0, v2.1 and v3.0) → frame cache, by pyarrow and PyAV alone; no TensorFlow, and none of lerobot's code.

Rows are found by `episode_index` and `frame_index` in all of data/**/*.parquet: converted sets name the wrong file in meta/episodes. An instruction
is that of the row's `task_index`. A frame of a video is the one whose time in the file is within half a frame of the row's; a video
is decoded once, from its beginning to its end.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prismatic.data.dataset_folder import AGAIN, is_lerobot, listing
from prismatic.data.keys import DataKeys, find_keys, parse_data_keys, sentences
from prismatic.data.lerobot_meta import (
    COUNTERS,
    DATA_FILES,
    Info,
    check_lengths,
    dimension_names,
    fields,
    read_info,
    read_table,
    read_tasks,
    train_episodes,
    video_file,
    video_places,
)  # fmt: skip
from prismatic.data.pictures import to_jpeg
from prismatic.data.video import VideoFrames
from prismatic.data.writer import CacheWriter, cached
from prismatic.errors import ConfigError
from prismatic.filenames import LEROBOT_INFO
from prismatic.hub import resolve

ROWS_AT_ONCE = 64  # of an image column that are in memory


class Rows(NamedTuple):
    """A row per frame, in order: episode after episode, frame after frame."""

    files: list[Path]
    file: np.ndarray  # (N,) number of the parquet file
    place: np.ndarray  # (N,) row in that file
    episode: np.ndarray  # (N,) int64, the data set's own number
    time: np.ndarray  # (N,) float64, seconds since the episode's start
    columns: dict[str, np.ndarray]


def build_cache(
    source: Path, cache_dir: Path, *, name: str | None = None, data_keys: str = "", rotate_images: bool = False
) -> Path:
    """The frame cache of a LeRobot folder under `cache_dir`, made now if it isn't there.

    name: the data set's, if not its folder's. data_keys: which fields are meant, see keys.py. rotate_images: turn each image by 180°.
    ConfigError for a folder that is no whole LeRobot data set, or lacks an image or an action.
    """
    source = Path(source).absolute()
    told = parse_data_keys(data_keys)
    info = read_info(source)
    keys = find_keys(fields(info, told), told, str(source))
    files = [
        source / LEROBOT_INFO,
        *source.glob("meta/**/*.parquet"),
        *source.glob("meta/*.jsonl"),
        *source.glob(DATA_FILES),
    ]
    for camera in filter(None, (keys.image, keys.wrist)):
        files += source.glob(f"videos/**/{camera}/**/*.mp4")
    identity = [listing(files), sorted(told.items()), rotate_images]
    title = name or source.name
    return cached(
        cache_dir, title, identity, lambda folder: _read(info, keys, folder, name=title, rotate=rotate_images)
    )


def fetch(repo_id: str, data_keys: str) -> Path | None:
    """The snapshot of a LeRobot data set on the hub: its meta/, its rows, the videos of the cameras that are read. None where it is no such set."""
    source = resolve(repo_id, kind="dataset", patterns=["meta/*"])
    if not is_lerobot(source):
        return None
    info, told = read_info(source), parse_data_keys(data_keys)
    keys = find_keys(fields(info, told), told, repo_id)
    cameras = [view for view in (keys.image, keys.wrist) if view and info.cameras()[view] == "video"]
    videos = [f"videos/{place}{name}/*" for name in cameras for place in ("", "*/")]  # v3.0, v2.x
    return resolve(repo_id, kind="dataset", patterns=["meta/*", "data/*", *videos])


def _read(info: Info, keys: DataKeys, folder: Path, *, name: str, rotate: bool) -> None:
    """Rows first, without images; then frame after frame. In memory: numbers, a few rows' images, a video's decoder for each camera."""
    from tqdm import tqdm

    rows = read_rows(info, [*keys.state, *keys.action, *([keys.instruction] if keys.instruction else [])])
    numbers, starts = np.unique(rows.episode, return_index=True)
    ends = [*starts[1:].tolist(), len(rows.episode)]
    places = video_places(info, keys)
    check_lengths(info, dict(zip(numbers.tolist(), np.diff([*starts, len(rows.episode)]).tolist(), strict=True)))
    said = _instructions(info, rows, keys.instruction)
    kinds = info.cameras()
    views = [view for view in (keys.image, keys.wrist) if view]
    streams = [
        _parquet_frames(rows, view) if kinds[view] == "image" else _video_frames(info, rows, view, places[view])
        for view in views
    ]
    writer = CacheWriter(folder, name=name, source=str(info.source), has_wrist=keys.wrist is not None)
    vectors = [rows.columns[column] for column in keys.action], [rows.columns[column] for column in keys.state]
    action, state = (np.concatenate(columns, axis=1) if columns else None for columns in vectors)
    assert action is not None
    with tqdm(total=len(numbers), desc=f"reading {name}", unit="episode") as bar:
        for number, start, end in zip(numbers.tolist(), starts.tolist(), ends, strict=True):
            where = f"episode {number} of {info.source}"
            writer.add(
                (
                    [
                        to_jpeg(next(stream), rotate=rotate, where=f"{view} of {where}")
                        for view, stream in zip(views, streams, strict=True)
                    ]
                    for _ in range(start, end)
                ),
                action=action[start:end],
                state=None if state is None else state[start:end],
                instructions=said[start:end],
                file_path=f"episode_{number:06d}",
            )
            bar.update()
    notes = sentences(keys)
    train, note = train_episodes(info, len(numbers))
    names = dimension_names(info, keys.action)
    writer.finish(train_episodes=train, action_names=names, fps=info.fps, notes=[*notes, *note])


def read_rows(info: Info, columns: Sequence[str]) -> Rows:
    """All rows but for their images. ConfigError for a missing column, and where an episode lacks a frame."""
    files = sorted(info.source.glob(DATA_FILES))
    if not files:
        raise ConfigError(f"{info.source} has no {DATA_FILES}: {AGAIN}")
    parts: dict[str, list[np.ndarray]] = {}
    for number, path in enumerate(files):
        table = read_table(path, [*COUNTERS, *columns])
        for name in ("episode_index", "frame_index", *columns):
            if name not in table.column_names:
                raise ConfigError(f"{path} has no column {name}, only {', '.join(table.column_names)}: {AGAIN}")
        for name in table.column_names:
            parts.setdefault(name, []).append(_array(table.column(name), f"{name} in {path}"))
        parts.setdefault("file", []).append(np.full(len(table), number))
        parts.setdefault("place", []).append(np.arange(len(table)))
    joined = {name: np.concatenate(pieces) for name, pieces in parts.items()}
    order = np.lexsort((joined["frame_index"], joined["episode_index"]))
    joined = {name: values[order] for name, values in joined.items() if len(values) == len(order)}
    episode, frame = joined["episode_index"], joined["frame_index"]
    first = np.r_[True, episode[1:] != episode[:-1]]
    expected = np.where(first, 0, np.r_[0, frame[:-1]] + 1)
    if (frame != expected).any():
        bad = int(np.argmax(frame != expected))
        raise ConfigError(
            f"episode {episode[bad]} of {info.source} goes from frame {expected[bad] - 1} to frame {frame[bad]}: {AGAIN}"
        )
    time = joined["timestamp"].astype(np.float64) if "timestamp" in joined else frame / (info.fps or np.nan)
    return Rows(files, joined["file"], joined["place"], episode, time, joined)


def _array(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """Numbers (n,) or texts (n,) as they are, lists as (n, D), as is a number that is no counter."""
    if column.null_count:
        raise ConfigError(f"{where} has {column.null_count} rows without a value: repair or drop those episodes")
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        pieces = [piece.flatten() for piece in column.chunks]  # unlike .values, flatten minds a slice's offset
        flat = np.concatenate([piece.to_numpy(zero_copy_only=False) for piece in pieces]) if pieces else np.zeros(0)
        lengths = {size for piece in column.chunks for size in _list_sizes(piece)}
        if len(lengths) != 1:
            raise ConfigError(f"{where} has vectors of several lengths ({sorted(lengths)}): give one whose rows agree")
        return flat.reshape(len(column), -1)
    values = column.to_numpy()
    return values if where.split()[0] in COUNTERS or values.dtype == object else values[:, None]


def _list_sizes(piece: pa.Array) -> set[int]:
    if pa.types.is_fixed_size_list(piece.type):
        return {piece.type.list_size}
    return set(np.diff(piece.offsets.to_numpy()).tolist())


def _instructions(info: Info, rows: Rows, column: str | None) -> list[str]:
    """What is said at each row, verbatim."""
    if column:
        return [str(text) for text in rows.columns[column]]
    tasks = read_tasks(info)
    if "task_index" not in rows.columns:
        raise ConfigError(f"{info.source} has no column task_index: give --data_keys instruction=…")
    numbers = rows.columns["task_index"].tolist()
    unknown = sorted(set(numbers) - set(tasks))
    if unknown:
        raise ConfigError(f"task_index {unknown[0]} of {info.source} is none of its tasks {sorted(tasks)[:9]}: {AGAIN}")
    return [tasks[number] for number in numbers]


def _parquet_frames(rows: Rows, camera: str) -> Iterator[bytes]:
    """The encoded images of a column, in the order of the rows; a few are in memory at a time where the file has that order."""
    for number, group in itertools.groupby(range(len(rows.file)), key=rows.file.__getitem__):
        path, order = rows.files[number], rows.place[list(group)]
        with pq.ParquetFile(path, pre_buffer=False) as file:
            if camera not in file.schema_arrow.names:
                raise ConfigError(f"{path} has no column {camera}: {AGAIN}")
            if len(order) == file.metadata.num_rows and (np.diff(order) == 1).all():
                batches: Any = (batch.column(0) for batch in file.iter_batches(ROWS_AT_ONCE, columns=[camera]))
            else:
                batches = [file.read(columns=[camera]).column(0).combine_chunks().take(pa.array(order))]
            for batch in batches:
                images = batch
                if pa.types.is_struct(batch.type):
                    images = batch.flatten()[batch.type.get_field_index("bytes")]
                for image in images:
                    if not image.is_valid:
                        raise ConfigError(f"{camera} in {path} has a row without an image's bytes: {AGAIN}")
                    yield image.as_py()


def _video_frames(
    info: Info, rows: Rows, camera: str, places: Mapping[int, tuple[Path, float]]
) -> Iterator[np.ndarray]:
    """The decoded frames of a camera, in the order of the rows."""
    if not np.isfinite(rows.time).all():  # no time is before or after NaN: the first frame would be that of every row
        raise ConfigError(f"{info.source} has rows without a timestamp and no fps in {LEROBOT_INFO}: add the fps there")
    steps = np.diff(rows.time)
    fps = info.fps or 1 / float(np.median(steps[steps > 0]))
    with VideoFrames(fps) as video:
        for episode, times in itertools.groupby(range(len(rows.episode)), key=rows.episode.__getitem__):
            number = int(episode)
            if info.version == 2:
                chunk = number // info.chunks_size
                place = (video_file(info, episode_chunk=chunk, video_key=camera, episode_index=number), 0.0)
            elif number in places:
                place = places[number]
            else:
                raise ConfigError(f"meta/episodes of {info.source} lacks episode {number}: {AGAIN}")
            for row in times:
                yield video.at(place[0], place[1] + float(rows.time[row]))
