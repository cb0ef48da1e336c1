"""LeRobot data sets: what the real library returns for them, and each pitfall of its formats.

Every name, size and count is taken from the sets themselves: a variant folder and `expected/<variant>.{json,npz}` beside it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prismatic.data import lerobot, video
from prismatic.data.frames import FrameCache
from prismatic.data.keys import DataKeys, find_keys
from prismatic.data.lerobot import drift
from prismatic.data.lerobot_meta import DATA_FILES, EPISODE_FILES, LeRobotFolder
from prismatic.data.mixture import open_cache
from prismatic.data.writer import pixels_of
from prismatic.errors import ConfigError
from prismatic.filenames import LEROBOT_INFO
from prismatic.image import decode_jpeg, jpeg_round_trip
from tests import pretended_hub
from tests.conftest import REPOSITORY

EXCERPT = Path(__file__).resolve().parent / "reference_lerobot"
FULL = Path(os.environ.get("LEROBOT_REFERENCE", REPOSITORY / "../shared/reference_lerobot"))
MEAN_TOLERANCE, MAX_TOLERANCE = 1.5, 4  # levels of a decoded video pixel, between FFmpeg's code paths


def variants() -> list[Path]:
    """The excerpt in this repository, and the full collection where it is there."""
    roots = [EXCERPT, *([FULL.resolve()] if FULL.is_dir() else [])]
    return [folder for root in roots for folder in sorted(root.iterdir()) if (folder / "meta").is_dir()]


def keys_of(folder: Path) -> DataKeys:
    return find_keys(LeRobotFolder(folder).fields({}), {}, "")


@pytest.fixture
def copied(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy, to be changed, of a variant of the kind that the test asks for: "v2" or "v3", and "image" or "video"."""
    number, dtype = request.param.split()
    for source in variants():
        found = LeRobotFolder(source)
        if f"v{found.version}" == number and dtype in found.cameras().values():
            return Path(shutil.copytree(source, tmp_path / "root" / source.name, copy_function=shutil.copyfile))
    pytest.skip(f"only the full collection has a {request.param}: set LEROBOT_REFERENCE")


def kinds(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("copied", names, indirect=True)


def read(folder: Path, **options: Any) -> FrameCache:
    return FrameCache(lerobot.build_cache(folder, folder.parents[1] / "cache", **options))


def change_info(folder: Path, **values: Any) -> None:
    """...: leave it out."""
    info = json.loads((folder / LEROBOT_INFO).read_text()) | values
    (folder / LEROBOT_INFO).write_text(json.dumps({key: value for key, value in info.items() if value is not ...}))


def rewrite(folder: Path, pattern: str, change: Callable[[pa.Table], pa.Table], **options: Any) -> None:
    for path in folder.glob(pattern):
        pq.write_table(change(pq.read_table(path)), path, **options)


def replace(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


# What the library returns


@pytest.mark.parametrize("folder", variants(), ids=lambda folder: f"{folder.parent.name[-12:]}/{folder.name}")
def test_a_set_is_what_the_library_returns(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels are compared as decoded, before the JPEG: the maximum sees a shift by one frame, which the mean of a still image doesn't."""
    opened: list[Path] = []
    plain = video.regular_file
    monkeypatch.setattr(video, "regular_file", lambda path, **how: (opened.append(path), plain(path, **how))[1])
    cache = open_cache(folder.parent, folder.name, cache_dir=tmp_path)
    assert sorted(opened) == sorted(folder.rglob("*.mp4"))  # each is decoded once
    words = json.loads((folder.parent / "expected" / f"{folder.name}.json").read_text())
    arrays = dict(np.load(folder.parent / "expected" / f"{folder.name}.npz"))
    assert cache.name == folder.name and cache.fps == pytest.approx(LeRobotFolder(folder).fps)
    assert cache.state is not None and (cache.state == arrays["state"]).all()
    assert (np.load(cache.folder / "steps.npz")["action"] == arrays["action"]).all()
    assert (np.bincount(cache.episode) == arrays["episode_lengths"]).all()
    assert (cache.timestep == arrays["frame_index"]).all()
    said = [cache.instruction(frame) for frame in range(len(cache))]
    assert [said[sample["index"]] for sample in words["samples"]] == [sample["task"] for sample in words["samples"]]
    if isinstance(words["tasks"], dict):
        assert said == [words["tasks"][str(number)] for number in arrays["task_index"].tolist()]
    for number, episode in enumerate(words["episodes"]):  # of which some have several instructions
        (runs,) = (part for part in episode.values() if isinstance(part, list) and part and isinstance(part[0], dict))
        assert {said[f] for f in np.flatnonzero(cache.episode == number)} == {run["task"] for run in runs}
    dataset, keys = LeRobotFolder(folder), keys_of(folder)
    rows = lerobot.read_rows(dataset, [])
    for camera, jpeg in ((keys.image, cache.image_bytes), (keys.wrist, cache.wrist_bytes)):
        assert camera
        pixels = np.stack([pixels_of(image, "") for image in lerobot.frames(dataset, rows, camera)])
        assert np.abs(pixels.mean((1, 2)) - arrays[f"mean_rgb__{camera}"]).max() <= MEAN_TOLERANCE
        exact = f"frames__{camera}" in arrays
        places = arrays["sample_index" if exact else "full_index"]
        whole = arrays[f"frames__{camera}" if exact else f"frames_full__{camera}"]
        pairs = [(pixels[places], whole)]
        if not exact:
            pairs.append((pixels[arrays["sample_index"], 1::4, 2::4], arrays[f"frames_sub4__{camera}"]))
        for ours, theirs in pairs:
            difference = np.abs(ours.astype(int) - theirs)
            assert difference.mean() <= (0 if exact else MEAN_TOLERANCE)
            assert difference.max() <= (0 if exact else MAX_TOLERANCE)
        for place, wanted in zip(places.tolist(), whole, strict=True):  # the cache holds JPEGs of the recorded size
            loss = np.abs(decode_jpeg(jpeg(place)).astype(int) - jpeg_round_trip(wanted)).mean()
            assert loss == 0 if exact else loss < 2 * MEAN_TOLERANCE


@kinds("v3 video")
def test_no_tensorflow_is_imported_or_started(copied: Path, tmp_path: Path) -> None:
    program = f"""
import sys, subprocess
from pathlib import Path
subprocess.Popen = None
from prismatic.data.mixture import open_cache
assert len(open_cache(Path({str(copied.parent)!r}), {copied.name!r}, cache_dir=Path({str(tmp_path)!r})))
assert not {{"tensorflow", "torch", "lerobot"}} & set(sys.modules), set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0


# What makes no difference


def shuffle(folder: Path) -> None:
    rewrite(folder, DATA_FILES, lambda t: t.take(np.random.default_rng(0).permutation(len(t))), row_group_size=7)
    for number, path in enumerate(sorted(folder.glob(DATA_FILES), reverse=True)):
        path.rename(path.with_name(f"part-{number}.parquet"))


def other_tasks(folder: Path) -> None:
    """By number, not by place; the text's column has no fixed name."""
    table = pq.read_table(folder / "meta/tasks.parquet")
    (text,) = {*table.column_names} - {"task_index"}
    columns = {"any": table.column(text).to_pylist()[::-1], "task_index": table.column("task_index").to_pylist()[::-1]}
    pq.write_table(pa.table(columns), folder / "meta/tasks.parquet")


def leave_out(folder: Path) -> None:
    """What foreign writers don't say; one calls the version by another name."""
    version = json.loads((folder / LEROBOT_INFO).read_text())["codebase_version"]
    names = "codebase_version total_chunks chunks_size video_path splits total_frames data_path fps"
    change_info(folder, **dict.fromkeys(names.split(), ...), version=version)
    (folder / "meta/stats.json").unlink(missing_ok=True)


def v2_0(folder: Path) -> None:
    """v2.1 with statistics of the whole, which are not believed."""
    (folder / "meta/stats.json").write_text('{"action": {"q01": [5.0]}}')
    change_info(folder, codebase_version="v2.0")


def other_type(kind: Any, change: Callable[[list[int]], list[float]] = list) -> Callable[[Path], None]:
    """Of the numbers of episodes, frames and tasks."""

    def written(table: pa.Table) -> pa.Table:
        for name in ("episode_index", "frame_index", "task_index"):
            table = replace(table, name, pa.array(change(table.column(name).to_pylist()), kind))
        return table

    return lambda folder: rewrite(folder, DATA_FILES, written)


SAME = [
    ("v3 image", other_type(pa.float64())), ("v2 video", other_type(pa.uint16())),
    ("v3 image", shuffle), ("v3 image", other_tasks), ("v2 video", leave_out), ("v3 video", leave_out), ("v2 video", v2_0),
]  # fmt: skip


@pytest.mark.parametrize(("copied", "change"), SAME, indirect=["copied"])
def test_it_is_the_same_set(copied: Path, change: Callable[[Path], None]) -> None:
    before = read(copied)
    change(copied)
    after = read(copied)
    assert after.folder != before.folder and after.fingerprint == before.fingerprint
    assert after.image_bytes(len(after) - 1) == before.image_bytes(len(before) - 1)
    assert after.statistics == before.statistics


def test_names_of_dimensions_and_splits_come_in_several_forms(tmp_path: Path) -> None:
    forms: dict[str, Any] = {
        "list": ["x", "y", "gripper"], "places": {"gripper": 2, "x": 0, "y": 1},
        "dictionary": {"motors": ["x", "y"], "hand": ["gripper"]}, "one": ["action"], "null": None,
    }  # fmt: skip
    info: dict[str, Any] = {"codebase_version": "v3.0"}
    info["features"] = {name: {"dtype": "float32", "shape": [3], "names": names} for name, names in forms.items()}
    (tmp_path / "meta").mkdir()
    (tmp_path / LEROBOT_INFO).write_text(json.dumps(info))
    names = LeRobotFolder(tmp_path).dimension_names
    assert [names([name])[-1:] for name in forms] == [["gripper"]] * 3 + [[], []]
    for splits, train, noted in (
        ({"train": "0:9"}, None, False),
        ({"train": "0:7", "val": "7:9"}, 7, False),
        ({"train": "0:70", "test": "70:90"}, None, True),  # frames, not episodes
        *(({"train": f"0:{end}", "val": f"{end}:9"}, None, True) for end in ("x", "", "-1", "99", "²", "9" * 5000)),
    ):
        change_info(tmp_path, splits=splits)
        found, notes = LeRobotFolder(tmp_path).train_episodes(9)
        assert found == train and any("--val_share" in note for note in notes) == noted


@kinds("v3 image")
@pytest.mark.parametrize("name", ["../{0}/{1}", "{1}/", "../{0}/../{0}/{1}"])
def test_a_cache_lies_in_its_folder_whatever_leads_to_the_set(copied: Path, tmp_path: Path, name: str) -> None:
    cache = open_cache(copied.parent, name.format(copied.parent.name, copied.name), cache_dir=tmp_path / "cache")
    assert cache.name == copied.name and cache.folder.parent == tmp_path / "cache"


@kinds("v3 image")
def test_a_camera_s_name_is_no_pattern(copied: Path) -> None:
    image, features = keys_of(copied).image, json.loads((copied / LEROBOT_INFO).read_text())["features"]
    change_info(copied, features={"**x" if name == image else name: value for name, value in features.items()})
    rewrite(
        copied, DATA_FILES, lambda t: t.rename_columns(["**x" if name == image else name for name in t.column_names])
    )
    assert len(read(copied, data_keys="image=**x"))


# What is refused


@pytest.mark.parametrize("name", ["..", ".hidden", "a" * 240, "a" * 300, "a" * 300 + "/b", "a/" * 3000 + "b"])
def test_what_is_no_folder_s_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"(--dataset_name|holds no data set 'a+[a/]*').*: (give|shorten)"):
        open_cache(tmp_path, name, cache_dir=tmp_path / "cache")


def last_file(folder: Path) -> Path:
    """A video, or where there is none a file of rows."""
    return sorted([*folder.rglob("*.mp4")] or folder.glob(DATA_FILES))[-1]


def dangle(path: Path) -> None:
    """As git-annex, DVC and an unfinished copy of a hub's cache leave it."""
    path.unlink()
    path.symlink_to("nowhere")


def no_time(folder: Path) -> None:
    """Each row would be given its video's first frame."""
    change_info(folder, fps=...)
    rewrite(folder, DATA_FILES, lambda table: table.drop_columns(["timestamp"]))


def no_start(folder: Path) -> None:
    """Each episode would begin where its file does."""
    rewrite(
        folder, EPISODE_FILES, lambda t: t.drop_columns([n for n in t.column_names if n.endswith("from_timestamp")])
    )


def still(folder: Path) -> None:
    """Some rows would share a frame."""
    rewrite(folder, DATA_FILES, lambda t: replace(t, "timestamp", pa.array([0.0] * len(t), pa.float32())))


def drifting(folder: Path) -> None:
    """From the third row on each is 0.8 frames late, and no step is so long that a row may be missing."""

    def late(table: pa.Table) -> pa.Table:
        frame = np.asarray(table["frame_index"])
        fps = json.loads((folder / "meta/info.json").read_text())["fps"]
        return replace(table, "timestamp", pa.array((frame + 0.4 * np.minimum(frame, 2)) / fps, pa.float32()))

    rewrite(folder, DATA_FILES, late)


def two_columns(folder: Path) -> None:
    """Which of the texts is the instruction?"""
    rewrite(folder, "meta/tasks.parquet", lambda t: pa.table({
        "task_index": t["task_index"], "category": ["kitchen"] * len(t), "other": ["place"] * len(t)}))  # fmt: skip


def other_start(second: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        name = f"videos/{keys_of(folder).image}/from_timestamp"
        rewrite(folder, EPISODE_FILES, lambda table: replace(table, name, pa.array([second] * len(table))))

    return change


def two_texts(folder: Path) -> None:
    line = json.loads((folder / "meta/tasks.jsonl").read_text().splitlines()[0]) | {"task": "another"}
    with (folder / "meta/tasks.jsonl").open("a") as file:
        file.write("\n" + json.dumps(line))


def no_bytes(folder: Path) -> None:
    """Paths alone, as the library writes them before it embeds the images."""
    name = keys_of(folder).image
    rewrite(folder, DATA_FILES, lambda table: replace(table, name, pa.array([{"path": "a.png"}] * len(table))))


def other_actions(action: list[Any]) -> Callable[[Path], None]:
    """In the last file."""

    def change(folder: Path) -> None:
        path = sorted(folder.glob(DATA_FILES))[-1]
        table = pq.read_table(path)
        pq.write_table(replace(table, keys_of(folder).action[0], pa.array(action * len(table))), path)

    return change


def test_a_clock_that_drifts_is_seen_and_a_gap_is_none() -> None:
    even = np.arange(120) / 30
    assert drift(even, 30) == 0 and drift(even + 0.001 * np.sin(even), 30) < 0.002
    assert drift(even / 1.0067, 30) > 0.5 / 30  # 30.2 a second: row 119 would get frame 118
    assert drift(np.delete(even, [40, 41]), 30) == 0


REFUSED: list[tuple[str, Callable[[Path], Any], str]] = [
    *((kind, lambda f: last_file(f).unlink(), "download or collect the data set again")
      for kind in ("v2 video", "v3 image", "v3 video")),
    *((kind, lambda f: dangle(last_file(f)), "link that leads nowhere")
      for kind in ("v2 video", "v3 image")),
    ("v3 video", lambda f: os.truncate(last_file(f), last_file(f).stat().st_size // 2), "again"),
    ("v3 video", lambda f: last_file(f).write_bytes(b"version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    ("v3 video", lambda f: change_info(f, codebase_version="v1.6"), r"v1\.6.*converter"),
    ("v3 video", no_time, "add the fps"),
    ("v3 video", no_start, "from_timestamp"),
    ("v3 video", other_start(0.0), "two episodes .* share second 0"),
    *((kind, still, "don't rise") for kind in ("v2 video", "v3 video")),
    *((kind, drifting, r"drift from fps .*frame_index / fps") for kind in ("v2 video", "v3 video")),
    ("v3 image", two_columns, "task"),
    *(("v3 video", other_start(second), "from_timestamp") for second in (float("nan"), float("inf"), 1e300, -1.0)),
    *((kind, lambda f, fps=fps: change_info(f, fps=fps), "mend the fps")
      for kind, fps in (("v2 video", 1), ("v3 video", 3), ("v3 video", 9.8), ("v3 video", 30))),
    *(("v3 image", other_type(pa.float64(), lambda n, bad=bad: [*n[1:], bad]), "no whole number")
      for bad in (0.5, -1.0, float("nan"), float("inf"), 1e300)),
    ("v3 video", lambda f: rewrite(f, EPISODE_FILES, lambda t: pa.concat_tables([t, t])), "two rows for one episode"),
    ("v2 video", two_texts, "two texts for task_index"),
    ("v3 image", no_bytes, "without an image's bytes"),
    ("v3 image", other_actions([[1e39] * 7]), "holds NaN or infinity"),
    ("v3 image", other_actions([[1.0] * 9]), "vectors of several lengths"),
    ("v3 image", other_actions(["up"]), "and no numbers"),
    *(("v3 video", lambda f, path=path: change_info(f, video_path=path), "video_path")
      for path in ("/dev/zero", "../outside.mp4", "videos/{no_such_name}.mp4")),
]  # fmt: skip


@pytest.mark.parametrize(("copied", "change", "sentence"), REFUSED, indirect=["copied"])
def test_one_sentence_says_what_is_wrong(copied: Path, change: Callable[[Path], None], sentence: str) -> None:
    change(copied)
    with pytest.raises(ConfigError, match=sentence):
        read(copied)
    assert [*(copied.parents[1] / "cache").glob("*")] == []


# Data sets of the hub


@kinds("v2 video", "v3 video", "v3 image")
def test_a_hub_id_fetches_what_is_read_and_no_more(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrist = keys_of(copied).wrist
    rooms = [path for room in ("meta", "data", "videos") for path in (copied / room).rglob("*") if path.is_file()]
    # of no use: other files, and a camera whose name ends with that of one that is read
    for name in ("README.md", "extra/model.safetensors", f"videos/chunk-000/x{keys_of(copied).image}/0.mp4"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text("nothing that is read")
    for told, unread in (("", ""), ("wrist=none", wrist)):
        snapshot = tmp_path / f"hub{told}/snapshots/0123abc"
        pretended_hub.serve(monkeypatch, f"someone/{copied.name}", "dataset", files=copied, snapshot=snapshot)
        cache = open_cache(f"someone/{copied.name}", copied.name, cache_dir=tmp_path / "cache", data_keys=told)
        fetched = {path.relative_to(snapshot) for path in snapshot.rglob("*") if path.is_file()}
        assert fetched == {path.relative_to(copied) for path in rooms if unread not in path.parts}
        assert cache.name == copied.name and cache.fingerprint == read(copied, data_keys=told).fingerprint
    with pytest.raises(ConfigError, match=f"give --dataset_name {copied.name}"):
        open_cache(f"someone/{copied.name}", "another", cache_dir=tmp_path / "cache")


# Videos


@pytest.mark.parametrize(("first_pts", "b_frames"), [(0, 0), (7, 3)])
def test_frames_are_found_by_presentation_time(tmp_path: Path, first_pts: int, b_frames: int) -> None:
    """10 frames a second; each frame's brightness is its number."""
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        options = {"g": "12", "bf": str(b_frames), "crf": "10"}
        stream: Any = container.add_stream("libx264", rate=10, options=options)
        stream.width = stream.height = 64
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 4 * number, dtype=np.uint8), format="rgb24")
            frame.pts = number + first_pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for numbers in ((0, 1, 2, 17, 18, 39), (5,), (30, 31), (13, 38)):
        seconds = [float(np.float32(number / 10)) for number in numbers]
        for fps in (10, 3, 0.1):  # claimed too small: never the neighbour
            for number, pixels in zip(numbers, video.frames_at(path, seconds, fps), strict=True):
                assert abs(pixels.mean() - 4 * number) < 2, number
    for absent in (0.05, 4.0, float("nan"), 1e300):
        with pytest.raises(ConfigError, match=r"no frame at|ends before|can't be decoded"):
            next(video.frames_at(path, [absent], 10))
