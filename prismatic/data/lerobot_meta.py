"""The LeRobot format, for its reader and its writer: columns, paths, and what a folder's meta/ says.

Not believed is what is known to be wrong: `data/file_index` of converted sets, quantiles of stats.json, `tasks` of an episode.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Meta

from prismatic.data.dataset_folder import AGAIN
from prismatic.errors import ConfigError
from prismatic.filenames import LEROBOT_INFO
from prismatic.ranges import Count
from prismatic.records import LARGEST_LINES, fields_of, parse_record, read_bytes, read_record, regular_file

# The columns that are no state and no action.
COUNTERS = {
    "timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64", "task_index": "int64",
}  # fmt: skip
CHUNK_FILES = 1000  # files, or in v2.x episodes, a folder
DATA_FILES = "data/**/*.parquet"
EPISODE_FILES = "meta/episodes/**/*.parquet"
PANDAS_INDEX = "__index_level_0__"  # where pandas writes an index without a name: v3.0's texts of tasks
# v3.0's files, in data/, meta/episodes/ and videos/<camera>/
NUMBERED = "chunk-{chunk_index:03d}/file-{file_index:03d}"
VIDEO_PATHS = {
    2: "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    3: f"videos/{{video_key}}/{NUMBERED}.mp4",
}
Row = TypeVar("Row")


# What is read of meta/tasks, meta/episodes and meta/info.json.
class _Task(TypedDict):
    task_index: Count
    task: str


class _Episode(TypedDict):
    episode_index: Count
    length: NotRequired[Count | None]


class _VideoPlace(TypedDict):
    chunk_index: Count
    file_index: Count
    from_timestamp: Annotated[float, Meta(ge=0, le=1e6)]  # seconds


class _Feature(TypedDict, total=False):
    dtype: str | None
    shape: list[Count] | None
    names: Any


class _Info(TypedDict):
    features: dict[str, _Feature]
    codebase_version: NotRequired[str | float | None]
    version: NotRequired[str | float | None]
    fps: NotRequired[Annotated[float, Meta(ge=0, le=10000)] | None]
    chunks_size: NotRequired[Count | None]
    video_path: NotRequired[str | None]
    splits: NotRequired[dict[str, Any] | None]


class LeRobotFolder:
    """A data set's description, with defaults for what foreign writers leave out. ConfigError where it is missing, damaged or of another format."""

    def __init__(self, source: Path) -> None:
        info = read_record(source / LEROBOT_INFO, _Info, way_out=AGAIN)
        newest = "v3.0" if any(source.glob(EPISODE_FILES)) else "v2.1"
        version = str(info.get("codebase_version") or info.get("version") or newest)
        number = re.match(r"v?([23])\b", version)
        if not number:
            raise ConfigError(
                f"{source} has LeRobot format {version:.80}, and v2.0 to v3.x are read: convert it with lerobot's own converter"
            )
        self.source = source
        self.version = int(number[1])
        self.features = info["features"]
        self.fps = info.get("fps") or None
        self.splits = info.get("splits") or {}
        self._chunks_size = info.get("chunks_size") or CHUNK_FILES
        self._video_path = info.get("video_path") or VIDEO_PATHS[self.version]

    def cameras(self) -> dict[str, str]:
        """Name → "image" or "video"."""
        return {name: str(f.get("dtype")) for name, f in self.features.items() if f.get("dtype") in ("image", "video")}

    def fields(self, told: Mapping[str, str]) -> dict[str, list[str]]:
        """Names of the cameras, vectors and, where an instruction column is told, texts."""
        dtypes = {name: str(f.get("dtype")) for name, f in self.features.items() if name not in COUNTERS}
        vectors = [name for name, dtype in dtypes.items() if dtype.startswith(("float", "int", "uint", "bool"))]
        texts = [name for name, dtype in dtypes.items() if dtype == "string"]
        return {"camera": [*self.cameras()], "vector": vectors} | ({"text": texts} if "instruction" in told else {})

    def dimension_names(self, columns: Sequence[str]) -> list[str]:
        """The names of the dimensions of joined vectors; empty where they aren't all named. info.json has lists,
        dictionaries of lists or of places, or null."""
        joined: list[str] = []
        for column in columns:
            names = self.features[column].get("names")
            if isinstance(names, Mapping) and all(isinstance(place, int) for place in names.values()):
                names = [name for name, _ in sorted(names.items(), key=lambda item: item[1])]
            if isinstance(names, Mapping):
                names = [name for part in names.values() for name in (part if isinstance(part, list) else [part])]
            width = int(np.prod(self.features[column].get("shape") or [0]))
            names = [column] if width == 1 else names
            if not isinstance(names, list) or len(names) != width:
                return []
            joined += map(str, names)
        return joined

    def tasks(self) -> dict[int, str]:
        """Number → instruction, of meta/tasks.parquet (v3.0: the text's column has no fixed name) or meta/tasks.jsonl."""
        path = self.source / "meta/tasks.parquet"
        if path.is_file() and self.version == 3:  # beside tasks.jsonl in an older set it is a converter's, and stale
            rows = read_table(path).to_pylist()
            for row in rows:
                texts = [value for value in row.values() if isinstance(value, str)]
                row.setdefault("task", row.get(PANDAS_INDEX) or (texts[0] if len(texts) == 1 else None))
            found = fields_of(rows, list[_Task], str(path), way_out=AGAIN)
        else:
            found = _lines(self.source / "meta/tasks.jsonl", _Task)
        texts = {row["task_index"]: row["task"] for row in found}
        for row in found:
            if row["task"] != texts[row["task_index"]]:
                raise ConfigError(f"tasks of {self.source} have two texts for task_index {row['task_index']}: {AGAIN}")
        return texts

    def check_lengths(self, lengths: Mapping[int, int]) -> None:
        """ConfigError where a file is missing, so that frames are."""
        for row in self._episodes():
            number, expected = row["episode_index"], row.get("length")
            if expected is not None and lengths.get(number, 0) != expected:
                raise ConfigError(
                    f"episode {number} of {self.source} has {lengths.get(number, 0)} of its {expected} frames: {AGAIN}"
                )

    def train_episodes(self, episodes: int) -> tuple[int | None, list[str]]:
        """How many episodes come before a validation split, and a note where splits are of another kind."""
        spans = {name: str(text).split(":") for name, text in self.splits.items()}
        for name in ("val", "validation"):
            train, held_out = spans.get("train"), spans.get(name)
            for first in range(1, episodes + 1):
                if [train, held_out] == [["0", str(first)], [str(first), str(episodes)]]:
                    return first, []
        if spans and spans != {"train": ["0", str(episodes)]}:
            return None, [f"its splits {self.splits} are not used: --val_share says what is held out"]
        return None, []

    def video_places(self, camera: str, episodes: Sequence[int]) -> list[tuple[Path, float]]:
        """Of each episode, its file, and the second in it at which the episode begins."""
        if self.version == 2:
            numbers = [{"episode_chunk": n // self._chunks_size, "episode_index": n} for n in episodes]
            return [(self._video(video_key=camera, **filled), 0.0) for filled in numbers]
        rows = {row["episode_index"]: row for row in self._episodes()}
        places = []
        for number in episodes:
            if number not in rows:
                raise ConfigError(f"meta/episodes of {self.source} lacks episode {number}: {AGAIN}")
            raw = {part: rows[number].get(f"videos/{camera}/{part}") for part in _VideoPlace.__annotations__}
            where = f"meta/episodes of {self.source}: episode {number}: videos/{camera}"
            place = fields_of(raw, _VideoPlace, where, way_out=AGAIN)
            path = self._video(video_key=camera, chunk_index=place["chunk_index"], file_index=place["file_index"])
            places.append((path, place["from_timestamp"]))
        return places

    def _video(self, **numbers: Any) -> Path:
        """Where info.json's video_path leads: within the folder, which is data from anywhere."""
        try:
            path = Path(self._video_path.format(**numbers))
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            reason = f"can't be filled in ({type(error).__name__}: {error})"
        else:
            if not path.is_absolute() and ".." not in path.parts:
                return self.source / path
            reason = "leads out of the data set's folder"
        raise ConfigError(f"{self.source / LEROBOT_INFO}: video_path {self._video_path!r:.80} {reason}: {AGAIN}")

    def _episodes(self) -> list[dict[str, Any]]:
        """The rows of meta/episodes, without statistics, which are most of its bytes."""
        if self.version == 2:
            path = self.source / "meta/episodes.jsonl"
            return [dict(row) for row in _lines(path, _Episode)] if path.is_file() else []
        tables = [
            read_table(path, lambda name: not name.startswith("stats/")) for path in self.source.glob(EPISODE_FILES)
        ]
        rows = [row for table in tables for row in table.to_pylist()]
        fields_of(rows, list[_Episode], f"meta/episodes of {self.source}", way_out=AGAIN)
        if len({row["episode_index"] for row in rows}) < len(rows):  # which of two places in a video?
            raise ConfigError(f"meta/episodes of {self.source} has two rows for one episode: {AGAIN}")
        return sorted(rows, key=lambda row: row["episode_index"])


def _lines(path: Path, kind: type[Row]) -> list[Row]:
    lines = read_bytes(path, largest=LARGEST_LINES, way_out=AGAIN).splitlines()
    return [parse_record(line, kind, str(path), way_out=AGAIN) for line in lines if line.strip()]


def read_table(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> pa.Table:
    """The columns of those names."""
    with regular_file(path, way_out=AGAIN):
        pass
    try:
        with pq.ParquetFile(path) as file:
            return file.read(columns=[*filter(wanted, file.schema_arrow.names)])
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path} is no whole parquet file ({str(error).splitlines()[0]}): {AGAIN}") from None
