"""What the meta/ folder of a LeRobot data set says: formats, fields, instructions, where an episode's frames lie in its videos.

Not believed is what is known to be wrong: `data/file_index` of converted sets, quantiles of stats.json, `tasks` of an episode.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Meta

from prismatic.data.dataset_folder import AGAIN, check_no_pointer
from prismatic.data.keys import DataKeys
from prismatic.errors import ConfigError
from prismatic.filenames import LEROBOT_INFO
from prismatic.ranges import Count
from prismatic.records import LARGEST_LINES, parse_record, read_bytes, read_checked

COUNTERS = (
    "timestamp",
    "frame_index",
    "episode_index",
    "index",
    "task_index",
)  # columns that are no state and no action
CHUNKS_SIZE = 1000  # episodes a folder, where info.json doesn't say
DATA_FILES = "data/**/*.parquet"
EPISODE_FILES = "meta/episodes/**/*.parquet"
VIDEO_PATHS = {
    2: "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    3: "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}


Row = TypeVar("Row")


# What is read of meta/tasks.jsonl, meta/episodes.jsonl and meta/info.json.
class _Task(TypedDict):
    task_index: Count
    task: str


class _Episode(TypedDict):
    episode_index: Count
    length: NotRequired[Count | None]


class _Feature(TypedDict, total=False):
    dtype: str | None
    shape: list[Count] | None
    names: Any


class _Description(TypedDict):
    features: dict[str, _Feature]
    codebase_version: NotRequired[str | float | None]
    version: NotRequired[str | float | None]
    fps: NotRequired[Annotated[float, Meta(ge=0, le=10000)] | None]
    chunks_size: NotRequired[Count | None]
    video_path: NotRequired[str | None]
    splits: NotRequired[dict[str, Any] | None]


class Info(NamedTuple):
    """What meta/info.json says, with defaults for what foreign writers leave out."""

    source: Path
    version: int  # 2 or 3
    fps: float | None
    features: Mapping[str, Mapping[str, Any]]
    chunks_size: int
    video_path: str
    splits: Mapping[str, str]

    def cameras(self) -> dict[str, str]:
        """Name → "image" or "video"."""
        return {name: str(f["dtype"]) for name, f in self.features.items() if f.get("dtype") in ("image", "video")}


def read_info(source: Path) -> Info:
    """meta/info.json; ConfigError where it is missing, damaged or of a format that isn't read."""
    path = source / LEROBOT_INFO
    try:
        raw = read_checked(path, _Description, way_out=AGAIN)
        version = str(
            raw.get("codebase_version") or raw.get("version") or ("v3.0" if any(source.glob(EPISODE_FILES)) else "v2.1")
        )
        number = int(version.lstrip("v").split(".")[0])
        features = {name: dict(feature) for name, feature in raw["features"].items()}
        size, fps = raw.get("chunks_size") or CHUNKS_SIZE, raw.get("fps")
        if number not in VIDEO_PATHS:
            raise ConfigError(
                f"{source} has LeRobot format {version}, and v2.0 to v3.x are read: convert it with lerobot's own converter"
            )
        video_path = raw.get("video_path") or VIDEO_PATHS[number]
        splits = raw.get("splits") or {}
        return Info(source, number, float(fps) if fps else None, features, int(size), str(video_path), dict(splits))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}): {AGAIN}") from None


def fields(info: Info, told: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of the cameras, vectors and, where an instruction column is told, texts."""
    rest = {name: str(f.get("dtype")) for name, f in info.features.items() if name not in COUNTERS}
    found = {
        "camera": list(info.cameras()),
        "vector": [name for name, dtype in rest.items() if dtype.startswith(("float", "int", "uint"))],
    }
    texts = [name for name, dtype in rest.items() if dtype == "string"]
    return found | ({"text": texts} if "instruction" in told else {})


def dimension_names(info: Info, columns: Sequence[str]) -> list[str]:
    """The names of the dimensions of joined vectors; empty where they aren't all named. info.json has lists, dictionaries of lists, or null."""
    joined: list[str] = []
    for column in columns:
        names = info.features[column].get("names")
        if isinstance(names, Mapping):
            names = [name for part in names.values() for name in (part if isinstance(part, list) else [part])]
        width = int(np.prod(info.features[column].get("shape") or [0]))
        names = [column] if width == 1 else names
        if not isinstance(names, list) or len(names) != width:
            return []
        joined += map(str, names)
    return joined


def read_tasks(info: Info) -> dict[int, str]:
    """Number → instruction, of meta/tasks.parquet (v3.0: the text's column has no fixed name) or meta/tasks.jsonl."""
    path = info.source / "meta/tasks.parquet"
    if path.is_file():
        table = read_table(path, None)
        texts = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        if "task_index" not in table.column_names or not texts:
            raise ConfigError(f"{path} has columns {table.column_names}, and no task_index with a text: {AGAIN}")
        text = "task" if "task" in texts else texts[0]
        return dict(zip(table.column("task_index").to_pylist(), table.column(text).to_pylist(), strict=True))
    return {line["task_index"]: line["task"] for line in _lines(info.source / "meta/tasks.jsonl", _Task)}


def _lines(path: Path, kind: type[Row]) -> list[Row]:
    lines = read_bytes(path, largest=LARGEST_LINES, way_out=AGAIN).splitlines()
    return [parse_record(line, kind, str(path), way_out=AGAIN) for line in lines if line.strip()]


def _episode_table(info: Info) -> list[dict[str, Any]]:
    """meta/episodes, without statistics, which are most of its bytes."""
    if info.version == 2:
        path = info.source / "meta/episodes.jsonl"
        return [dict(row) for row in _lines(path, _Episode)] if path.is_file() else []
    rows: list[dict[str, Any]] = []
    for path in sorted(info.source.glob(EPISODE_FILES)):
        names = pq.read_schema(path).names
        rows += read_table(path, [name for name in names if not name.startswith("stats/")]).to_pylist()
    return sorted(rows, key=lambda row: row["episode_index"])


def check_lengths(info: Info, lengths: Mapping[int, int]) -> None:
    """ConfigError where a file is missing, so that frames are."""
    for row in _episode_table(info):
        number, expected = row["episode_index"], row.get("length")
        if expected is not None and lengths.get(number, 0) != expected:
            raise ConfigError(
                f"episode {number} of {info.source} has {lengths.get(number, 0)} of its {expected} frames: {AGAIN}"
            )


def train_episodes(info: Info, episodes: int) -> tuple[int | None, list[str]]:
    """How many episodes come before a validation split, and a note where splits are of another kind."""
    spans = {name: str(text).split(":") for name, text in info.splits.items()}
    for name in ("val", "validation"):
        train, held_out = spans.get("train"), spans.get(name)
        if train and held_out and train[0] == "0" and train[1] == held_out[0] and held_out[1] == str(episodes):
            return int(train[1]), []
    if spans and spans != {"train": ["0", str(episodes)]}:
        return None, [f"its splits {dict(info.splits)} are not used: --val_share says what is held out"]
    return None, []


def video_places(info: Info, keys: DataKeys) -> dict[str, dict[int, tuple[Path, float]]]:
    """Camera → episode → its file, and the second in it at which the episode begins."""
    cameras = [view for view in (keys.image, keys.wrist) if view and info.cameras()[view] == "video"]
    places: dict[str, dict[int, tuple[Path, float]]] = {camera: {} for camera in cameras}
    if info.version == 2:
        return places
    for row in _episode_table(info) if cameras else ():
        for camera in cameras:
            chunk, file, start = (
                row.get(f"videos/{camera}/{part}") for part in ("chunk_index", "file_index", "from_timestamp")
            )
            if chunk is None or file is None:
                raise ConfigError(f"meta/episodes of {info.source} doesn't say where videos/{camera} are: {AGAIN}")
            path = video_file(info, video_key=camera, chunk_index=chunk, file_index=file)
            places[camera][row["episode_index"]] = (path, float(start or 0.0))
    return places


def video_file(info: Info, **numbers: Any) -> Path:
    """Where info.json's video_path leads: within the folder, which is data from anywhere."""
    try:
        path = Path(info.video_path.format(**numbers))
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        reason = f"can't be filled in ({type(error).__name__}: {error})"
    else:
        if not path.is_absolute() and ".." not in path.parts:
            return info.source / path
        reason = "leads out of the data set's folder"
    raise ConfigError(f"{info.source / LEROBOT_INFO}: video_path {info.video_path!r:.80} {reason}: {AGAIN}")


def read_table(path: Path, columns: Sequence[str] | None) -> pa.Table:
    """Those of the columns that the file has."""
    check_no_pointer(path)
    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            return file.read(columns=there if columns is None else [name for name in there if name in columns])
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path} is no whole parquet file ({str(error).splitlines()[0]}): {AGAIN}") from None
