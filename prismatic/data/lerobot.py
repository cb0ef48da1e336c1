"""LeRobot data sets (formats v2.0, v2.1 and v3.0) → frame cache, by pyarrow and PyAV alone; no TensorFlow, and none of lerobot's code.

Rows are found by `episode_index` and `frame_index` in all of data/**/*.parquet: converted sets name the wrong file in meta/episodes. An instruction
is that of the row's `task_index`. A frame of a video is the one whose time in the file is within half a frame of the row's; a video
is decoded once, from its beginning to its end.
"""

import functools
import glob
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow.compute import call_function

from prismatic.data.dataset_folder import AGAIN, is_lerobot, listing
from prismatic.data.keys import DataKeys, find_keys, parse_data_keys, sentences
from prismatic.data.lerobot_meta import COUNTERS, DATA_FILES, LeRobotFolder, read_table
from prismatic.data.made_once import cached
from prismatic.data.video import frames_at
from prismatic.data.writer import CacheWriter
from prismatic.errors import ConfigError
from prismatic.filenames import LEROBOT_INFO
from prismatic.hub import resolve


class Rows(NamedTuple):
    """A row per frame, in order: episode after episode, frame after frame."""

    files: list[Path]
    file: np.ndarray  # (N,) number of the parquet file
    place: np.ndarray  # (N,) row in that file
    episode: np.ndarray  # (N,) the data set's own number
    time: np.ndarray  # (N,) float64, seconds since the episode's start
    columns: dict[str, np.ndarray]  # (N, D) each

    def spans(self) -> dict[int, slice]:
        """Of each episode, by number, its rows."""
        numbers, starts = np.unique(self.episode, return_index=True)
        ends = [*starts[1:].tolist(), len(self.episode)]
        return dict(zip(numbers.tolist(), map(slice, starts.tolist(), ends), strict=True))


def build_cache(
    source: Path, cache_dir: Path, *, name: str | None = None, data_keys: str = "", rotate_images: bool = False
) -> Path:
    """The frame cache of a LeRobot folder under `cache_dir`, made now if it isn't there.

    name: the data set's, if not its folder's. data_keys: which fields are meant, see keys.py. rotate_images: turn each image by 180°.
    ConfigError for a folder that is no whole LeRobot data set, or lacks an image or an action.
    """
    source, told = Path(source).absolute(), parse_data_keys(data_keys)
    dataset = LeRobotFolder(source)
    keys = find_keys(dataset.fields(told), told, str(source))
    patterns = ["meta/**/*.parquet", "meta/*.jsonl", DATA_FILES]
    patterns += [f"videos/**/{glob.escape(camera)}/**/*.mp4" for camera in keys.views]
    files = [source / LEROBOT_INFO, *(path for pattern in patterns for path in source.glob(pattern))]
    identity, title = [listing(files), sorted(told.items()), rotate_images, "held-out drawn"], name or source.name
    fill = functools.partial(_read, dataset, keys, name=title, rotate=rotate_images)
    return cached(cache_dir, title, identity, fill)


def fetch(repo_id: str, data_keys: str) -> Path | None:
    """The snapshot of a LeRobot data set on the hub: its meta/, its rows, the videos of the cameras that are read. None where it is no such set."""
    source = resolve(repo_id, kind="dataset", patterns=["meta/*"])
    if not is_lerobot(source):
        return None
    dataset, told = LeRobotFolder(source), parse_data_keys(data_keys)
    keys = find_keys(dataset.fields(told), told, repo_id)
    cameras = [glob.escape(view) for view in keys.views if dataset.cameras()[view] == "video"]
    videos = [f"videos/{place}{name}/*" for name in cameras for place in ("", "*/")]  # v3.0, v2.x
    return resolve(repo_id, kind="dataset", patterns=["meta/*", "data/*", *videos])


def _read(dataset: LeRobotFolder, keys: DataKeys, folder: Path, *, name: str, rotate: bool) -> None:
    """Rows first, without images; then frame after frame. In memory: numbers, and for each camera a file's images or a video's decoder."""
    from tqdm import tqdm

    rows = read_rows(dataset, [*keys.state, *keys.action], text=keys.instruction)
    spans = rows.spans()
    dataset.check_lengths({number: span.stop - span.start for number, span in spans.items()})
    said = _instructions(dataset, rows, keys.instruction)
    streams = [frames(dataset, rows, view) for view in keys.views]
    writer = CacheWriter(folder, name=name, source=str(dataset.source), views=keys.views, rotate=rotate)
    action = np.concatenate([rows.columns[column] for column in keys.action], axis=1)
    state = np.concatenate([rows.columns[column] for column in keys.state], axis=1) if keys.state else None
    for number, span in tqdm(spans.items(), desc=f"reading {name}", unit="episode"):
        writer.add(
            itertools.islice(zip(*streams, strict=True), span.stop - span.start),
            action=action[span],
            state=None if state is None else state[span],
            instructions=said[span],
            file_path=f"episode_{number:06d}",
        )
    train, notes = dataset.train_episodes(len(spans))
    writer.finish(
        train_episodes=train,
        in_order=True,
        action_names=dataset.dimension_names(keys.action),
        fps=dataset.fps,
        notes=[*sentences(keys), *notes],
    )


def read_rows(dataset: LeRobotFolder, vectors: Sequence[str], *, text: str | None = None) -> Rows:
    """All rows but for their images. text: a column of instructions. ConfigError for a missing column, and where an episode lacks a frame."""
    files, columns = sorted(dataset.source.glob(DATA_FILES)), [*vectors, *([text] if text else [])]
    parts: list[dict[str, np.ndarray]] = []
    for number, path in enumerate(files):
        table = read_table(path, {*COUNTERS, *columns}.__contains__)
        for name in ("episode_index", "frame_index", *columns):
            if name not in table.column_names:
                raise ConfigError(f"{path} has no column {name}, only {', '.join(table.column_names)}: {AGAIN}")
        if len(table):
            found = {n: _array(table.column(n), f"{n} in {path}", numbers=n != text) for n in table.column_names}
            parts.append(found | {"file": np.full((len(table), 1), number), "place": np.arange(len(table))[:, None]})
    if not parts:
        raise ConfigError(f"{dataset.source} has no row in {DATA_FILES}: {AGAIN}")
    joined = {}
    for name in set.intersection(*map(set, parts)):
        pieces = [part[name] for part in parts]
        _check_widths({piece.shape[1] for piece in pieces}, f"{name} of {dataset.source}")
        joined[name] = np.concatenate(pieces)
    for name in {"episode_index", "frame_index", "task_index"} & {*joined}:
        numbers = joined[name]  # pandas makes floats of some
        if not ((np.floor(numbers) == numbers) & (numbers >= 0) & (numbers < 2**53)).all():
            raise ConfigError(f"{name} of {dataset.source} has a row that is no whole number from 0 on: {AGAIN}")
        joined[name] = numbers.astype(np.int64)
    order = np.lexsort((joined["frame_index"][:, 0], joined["episode_index"][:, 0]))
    joined = {name: values[order] for name, values in joined.items()}
    episode, frame = joined["episode_index"][:, 0], joined["frame_index"][:, 0]
    expected = np.concatenate([np.arange(length) for length in np.unique(episode, return_counts=True)[1]])
    if (frame != expected).any():
        bad = int(np.argmax(frame != expected))
        raise ConfigError(
            f"episode {episode[bad]} of {dataset.source} has frame {frame[bad]} where frame {expected[bad]} belongs: {AGAIN}"
        )
    time = joined["timestamp"][:, 0].astype(np.float64) if "timestamp" in joined else frame / (dataset.fps or np.nan)
    return Rows(files, joined["file"][:, 0], joined["place"][:, 0], episode, time, joined)


def _array(column: pa.ChunkedArray, where: str, *, numbers: bool) -> np.ndarray:
    """(n, D) of lists of numbers; (n, 1) of a number, or a text, each."""
    if column.null_count:
        raise ConfigError(f"{where} has {column.null_count} rows without a value: repair or drop those episodes")
    rows, kind = len(column), column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        _check_widths({*call_function("list_value_length", [column]).unique().to_pylist()}, where)
        column = call_function("list_flatten", [column])
    values = column.to_numpy().reshape(rows, -1)
    if numbers and values.dtype.kind not in "biuf":
        raise ConfigError(f"{where} holds {kind} and no numbers: give --data_keys another column")
    return values


def _check_widths(widths: set[int], where: str) -> None:
    if len(widths) > 1:
        raise ConfigError(f"{where} has vectors of several lengths ({sorted(widths)}): give one whose rows agree")


def _instructions(dataset: LeRobotFolder, rows: Rows, column: str | None) -> list[str]:
    """What is said at each row, verbatim."""
    if column:
        return [str(text) for text in rows.columns[column][:, 0]]
    tasks = dataset.tasks()
    if "task_index" not in rows.columns:
        raise ConfigError(f"{dataset.source} has no column task_index: give --data_keys instruction=…")
    numbers = rows.columns["task_index"][:, 0].tolist()
    unknown = sorted(set(numbers) - set(tasks))
    if unknown:
        raise ConfigError(
            f"task_index {unknown[0]} of {dataset.source} is none of its tasks {sorted(tasks)[:9]}: {AGAIN}"
        )
    return [tasks[number] for number in numbers]


def frames(dataset: LeRobotFolder, rows: Rows, camera: str) -> Iterator[Any]:
    """A camera's images in the order of the rows: encoded as the rows hold them, or pixels of its videos."""
    return (
        _parquet_frames(rows, camera) if dataset.cameras()[camera] == "image" else _video_frames(dataset, rows, camera)
    )


def _parquet_frames(rows: Rows, camera: str) -> Iterator[bytes]:
    """A file's images are in memory at a time, encoded: some 100 MB, as the library writes them."""
    for number, group in itertools.groupby(range(len(rows.file)), key=rows.file.__getitem__):
        path = rows.files[number]
        table = read_table(path, {camera}.__contains__)
        if not table.column_names:
            raise ConfigError(f"{path} has no column {camera}: {AGAIN}")
        images = table.column(0)
        for place in rows.place[list(group)].tolist():
            image = images[place].as_py()
            image = image.get("bytes") if isinstance(image, dict) else image
            if image is None:
                raise ConfigError(f"{camera} in {path} has a row without an image's bytes: {AGAIN}")
            yield image


def drift(seconds: np.ndarray, fps: float) -> float:
    """By how much rows' times (N,) leave an even rate, s; 0 where rows were left out, as only then the video may have frames between them."""
    if (np.diff(seconds) > 1.5 / fps).any():
        return 0.0
    return float(np.abs(seconds - seconds[0] - np.arange(len(seconds)) / fps).max())


def _video_frames(dataset: LeRobotFolder, rows: Rows, camera: str) -> Iterator[np.ndarray]:
    """Episodes that lie one after the other in a file are decoded in one go."""
    if not np.isfinite(rows.time).all():  # no time is before or after NaN: the first frame would be that of every row
        raise ConfigError(
            f"{dataset.source} has rows without a timestamp and no fps in {LEROBOT_INFO}: add the fps there"
        )
    steps = np.diff(rows.time)
    if (steps[np.diff(rows.episode) == 0] <= 0).any():  # several rows would get one frame
        raise ConfigError(f"{dataset.source} has timestamps that don't rise within an episode: {AGAIN}")
    rate = 1 / float(np.median(steps[steps > 0])) if (steps > 0).any() else dataset.fps or 1.0
    fps = dataset.fps or rate
    if abs(rate / fps - 1) > 0.01:
        said = f"{dataset.source / LEROBOT_INFO} says fps {fps:g}"
        raise ConfigError(f"{said}, and its rows are {rate:g} a second by their timestamps: mend the fps there")
    spans = rows.spans()
    for number, span in spans.items():
        if (late := drift(rows.time[span], fps)) > 0.5 / fps:
            said = f"episode {number} of {dataset.source} has timestamps that drift from fps {fps:g} by {late:.3g} s"
            raise ConfigError(f"{said}, more than half a frame: write frame_index / fps as timestamp")
    places = zip(dataset.video_places(camera, [*spans]), spans.values(), strict=True)
    parts = [(path, (begins + rows.time[span]).tolist()) for (path, begins), span in places]
    for (path, before), (other, after) in itertools.pairwise(sorted(parts)):
        if path == other and after[0] < before[-1] + 1e-3:
            said = f"two episodes of {dataset.source} share second {after[0]:.6g} of {path.name}"
            raise ConfigError(f"{said}: mend from_timestamp in meta/episodes, or drop one of them")
    runs: list[tuple[Path, list[float]]] = []
    for path, seconds in parts:
        if runs and runs[-1][0] == path and runs[-1][1][-1] < seconds[0]:
            runs[-1][1].extend(seconds)
        else:
            runs.append((path, seconds))
    for path, seconds in runs:
        yield from frames_at(path, seconds, fps)
