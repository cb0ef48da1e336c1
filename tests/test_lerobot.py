"""LeRobot data sets: what the real library returns for them, and each pitfall of its formats.

Every name, size and count is taken from the sets themselves: a variant folder and `expected/<variant>.{json,npz}` beside it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import filter_repo_objects

from prismatic.data import lerobot, lerobot_meta
from prismatic.data.frames import FrameCache
from prismatic.data.keys import find_keys
from prismatic.data.mixture import open_cache
from prismatic.data.video import VideoFrames
from prismatic.errors import ConfigError
from prismatic.image import decode_jpeg, jpeg_round_trip
from tests.conftest import REPOSITORY

EXCERPT = Path(__file__).resolve().parent / "reference_lerobot"
FULL = Path(os.environ.get("LEROBOT_REFERENCE", REPOSITORY / "../shared/reference_lerobot"))
MEAN_TOLERANCE, MAX_TOLERANCE = 1.5, 4  # levels of a decoded video pixel, between FFmpeg's code paths


def variants() -> list[Path]:
    """The excerpt in this repository, and the full collection where it is there."""
    roots = [EXCERPT, *([FULL.resolve()] if FULL.is_dir() else [])]
    return [folder for root in roots for folder in sorted(root.iterdir()) if (folder / "meta").is_dir()]


def expected(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(folder.parent / "expected" / f"{folder.name}.npz") as arrays:
        return json.loads((folder.parent / "expected" / f"{folder.name}.json").read_text()), dict(arrays)


def some(kind: str) -> Path:
    """A variant by what is in it: "v2" or "v3", and "image" or "video"."""
    number, _, dtype = kind.partition(" ")
    for folder in variants():
        info = lerobot.read_info(folder)
        if f"v{info.version}" == number and dtype in info.cameras().values():
            return folder
    pytest.skip(f"only the full collection has a {kind}: set LEROBOT_REFERENCE")


@pytest.fixture(params=variants(), ids=lambda folder: f"{folder.parent.name[-12:]}/{folder.name}")
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def cache(folder: Path, tmp_path: Path) -> FrameCache:
    return open_cache(folder.parent, folder.name, cache_dir=tmp_path)


@pytest.fixture
def copied(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy, to be changed, of the kind that the test asks for."""
    source = some(request.param)
    return Path(shutil.copytree(source, tmp_path / "root" / source.name, copy_function=shutil.copyfile))


def read(folder: Path, **options: Any) -> FrameCache:
    return FrameCache(lerobot.build_cache(folder, folder.parents[1] / "cache", **options))


def change_info(folder: Path, **values: Any) -> None:
    path = folder / "meta/info.json"
    info = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in info.items() if value is not ...}))


def rewrite(path: Path, change: Any, **options: Any) -> None:
    """A parquet file changed as a table."""
    table = pq.read_table(path)
    pq.write_table(change(table), path, **options)


# What the library returns


def test_numbers_instructions_and_episodes(folder: Path, cache: FrameCache) -> None:
    words, arrays = expected(folder)
    assert cache.name == folder.name
    assert cache.state is not None and (cache.state == arrays["state"]).all()
    with np.load(cache.folder / "steps.npz") as steps:
        assert (steps["action"] == arrays["action"]).all()
    assert (np.bincount(cache.episode) == arrays["episode_lengths"]).all()
    assert (cache.timestep == arrays["frame_index"]).all()
    said = {int(number): text for number, text in words["tasks"].items()} if isinstance(words["tasks"], dict) else None
    for sample in words["samples"]:
        assert cache.instruction(sample["index"]) == sample["task"]
    if said:
        assert [cache.instruction(frame) for frame in range(len(cache))] == [
            said[n] for n in arrays["task_index"].tolist()
        ]
    assert cache.fps == pytest.approx(lerobot.read_info(folder).fps)


def test_pixels_are_the_frames_own(folder: Path) -> None:
    """Decoded, before the JPEG: the maximum sees a shift by one frame, which the mean of a still picture doesn't."""
    _, arrays = expected(folder)
    info = lerobot.read_info(folder)
    keys = find_keys(lerobot.fields(info, {}), {}, "")
    rows = lerobot.read_rows(info, [])
    places = lerobot.video_places(info, keys)
    for camera in filter(None, (keys.image, keys.wrist)):
        if info.cameras()[camera] == "image":
            frames: Iterator[Any] = lerobot._parquet_frames(rows, camera)
            pixels = np.stack([lerobot_pixels(data) for data in frames])
            assert (pixels[arrays["sample_index"]] == arrays[f"frames__{camera}"]).all()
        else:
            pixels = np.stack(list(lerobot._video_frames(info, rows, camera, places[camera])))
            small = pixels[arrays["sample_index"], 1::4, 2::4].astype(int) - arrays[f"frames_sub4__{camera}"]
            full = pixels[arrays["full_index"]].astype(int) - arrays[f"frames_full__{camera}"]
            for difference in (small, full):
                assert np.abs(difference).mean() <= MEAN_TOLERANCE and np.abs(difference).max() <= MAX_TOLERANCE
        assert np.abs(pixels.mean((1, 2)) - arrays[f"mean_rgb__{camera}"]).max() <= MEAN_TOLERANCE


def lerobot_pixels(data: bytes) -> np.ndarray:
    from prismatic.data.pictures import _pixels

    return _pixels(data, "")


def test_the_cache_holds_jpegs_of_the_recorded_size(folder: Path, cache: FrameCache) -> None:
    _, arrays = expected(folder)
    info = lerobot.read_info(folder)
    keys = find_keys(lerobot.fields(info, {}), {}, "")
    for camera, jpeg in ((keys.image, cache.image_bytes), (keys.wrist, cache.wrist_bytes)):
        if f"frames__{camera}" in arrays:
            for frame, pixels in zip(arrays["sample_index"].tolist(), arrays[f"frames__{camera}"], strict=True):
                assert (decode_jpeg(jpeg(frame)) == jpeg_round_trip(pixels)).all()
        else:
            for frame, pixels in zip(arrays["full_index"].tolist(), arrays[f"frames_full__{camera}"], strict=True):
                assert (
                    np.abs(decode_jpeg(jpeg(frame)).astype(int) - jpeg_round_trip(pixels)).mean() < 2 * MEAN_TOLERANCE
                )


def test_no_tensorflow_is_imported_or_started(tmp_path: Path) -> None:
    folder = some("v3 video")
    program = f"""
import sys
from pathlib import Path
import subprocess
def refuse(*a, **k): raise AssertionError("a process was started")
subprocess.Popen = refuse
from prismatic.data.mixture import open_cache
cache = open_cache(Path({str(folder.parent)!r}), {folder.name!r}, cache_dir=Path({str(tmp_path)!r}))
assert len(cache) and not {{"tensorflow", "torch", "lerobot"}} & set(sys.modules), set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0


# The pitfalls


@pytest.mark.parametrize("copied", ["v3 image"], indirect=True)
def test_tasks_are_mapped_by_number_not_by_place_and_stay_verbatim(copied: Path) -> None:
    before = read(copied)
    path = copied / "meta/tasks.parquet"
    table = pq.read_table(path)
    numbers = table.column("task_index").to_pylist()[::-1]
    (text,) = (name for name in table.column_names if name != "task_index")
    texts = [f" {t}\t" for t in table.column(text).to_pylist()[::-1]]
    for name in ("task", "__index_level_0__"):
        pq.write_table(pa.table({name: texts, "task_index": numbers}), path)
        after = read(copied)
        assert [after.instruction(f) for f in range(len(after))] == [
            f" {before.instruction(f)}\t" for f in range(len(before))
        ]


def test_an_episode_may_have_several_instructions(folder: Path, cache: FrameCache) -> None:
    words, _ = expected(folder)
    several = [
        n
        for n in range(len(cache.file_paths))
        if len({cache.instruction(int(f)) for f in np.flatnonzero(cache.episode == n)}) > 1
    ]
    assert several == [
        n for n, episode in enumerate(words["episodes"]) if len({run["task"] for run in runs(episode)}) > 1
    ]


def runs(episode: dict[str, Any]) -> list[dict[str, Any]]:
    (found,) = [value for value in episode.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return found


@pytest.mark.parametrize("copied", ["v3 image"], indirect=True)
def test_the_file_numbers_of_meta_episodes_are_not_believed(copied: Path) -> None:
    def misnumber(table: pa.Table) -> pa.Table:
        place = table.column_names.index("data/file_index")
        return table.set_column(place, "data/file_index", pa.array([77] * len(table)))

    before = read(copied)
    for path in copied.glob(lerobot_meta.EPISODE_FILES):
        rewrite(path, misnumber)
    after = read(copied)
    assert after.folder != before.folder and after.fingerprint == before.fingerprint


@pytest.mark.parametrize("copied", ["v3 image"], indirect=True)
def test_rows_in_another_order_and_files_of_other_names_are_the_same_set(copied: Path) -> None:
    before = read(copied)
    files = sorted(copied.glob(lerobot.DATA_FILES))
    for number, path in enumerate(files):
        rewrite(path, lambda t: t.take(np.random.default_rng(0).permutation(len(t))), row_group_size=7)
        path.rename(path.with_name(f"part-{len(files) - number}.parquet"))
    after = read(copied)
    assert after.fingerprint == before.fingerprint
    assert after.image_bytes(len(after) - 1) == before.image_bytes(len(before) - 1)


@pytest.mark.parametrize("copied", ["v3 image", "v2 image"], indirect=True)
def test_lists_of_either_kind_and_their_slices(copied: Path) -> None:
    before = read(copied)
    info = lerobot.read_info(copied)
    vectors = [name for name in lerobot.fields(info, {})["vector"]]

    def variable(table: pa.Table) -> pa.Table:
        for name in vectors:
            column = table.column(name)
            width = len(column[0].as_py())
            kind = pa.list_(pa.float64()) if pa.types.is_fixed_size_list(column.type) else pa.list_(pa.float32(), width)
            table = table.set_column(table.column_names.index(name), name, pa.array(column.to_pylist(), type=kind))
        return table

    for path in copied.glob(lerobot.DATA_FILES):
        rewrite(path, variable)
    assert read(copied).fingerprint == before.fingerprint
    slice_ = pa.chunked_array([pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], type=pa.list_(pa.float32(), 2))[1:]])
    assert lerobot._array(slice_, "state").tolist() == [[3.0, 4.0], [5.0, 6.0]]


@pytest.mark.parametrize("copied", ["v2 image", "v3 video"], indirect=True)
def test_what_foreign_writers_leave_out_has_defaults(copied: Path) -> None:
    before = read(copied)
    version = json.loads((copied / "meta/info.json").read_text())["codebase_version"]
    fps = float(before.fps or 0)
    keep = {"codebase_version": ..., "version": version, "fps": fps}
    change_info(
        copied, **keep, total_chunks=..., chunks_size=..., video_path=..., splits=..., total_frames=..., data_path=...
    )
    after = read(copied)
    assert after.fingerprint == before.fingerprint and after.folder != before.folder
    change_info(copied, fps=...)
    assert read(copied).fingerprint == before.fingerprint


@pytest.mark.parametrize("copied", ["v2 image"], indirect=True)
def test_splits_by_episodes_are_used_others_named(copied: Path) -> None:
    episodes = len(read(copied).file_paths)
    change_info(copied, splits={"train": f"0:{episodes - 1}", "val": f"{episodes - 1}:{episodes}"})
    cache = read(copied)
    assert set(cache.episode[cache.validation_indices(0.0)]) == {episodes - 1}
    change_info(copied, splits={"train": "0:70", "test": "70:90"})
    assert any("--val_share" in note for note in read(copied).notes)


@pytest.mark.parametrize("copied", ["v2 image", "v2 video", "v3 image", "v3 video"], indirect=True)
def test_a_missing_file_is_named(copied: Path) -> None:
    kind = "mp4" if "video" in lerobot.read_info(copied).cameras().values() else "parquet"
    files = sorted((copied / ("videos" if kind == "mp4" else "data")).rglob(f"*.{kind}"))
    files[-1].unlink()
    with pytest.raises(ConfigError, match=r"download or collect the data set again"):
        read(copied)
    assert list((copied.parents[1] / "cache").iterdir()) == []


@pytest.mark.parametrize("copied", ["v3 video"], indirect=True)
def test_files_that_git_lfs_has_to_fetch_or_that_are_cut_off(copied: Path) -> None:
    video, rows = next(copied.rglob("*.mp4")), next(copied.glob(lerobot.DATA_FILES))
    content = video.read_bytes()
    for path in (video, rows):
        kept = path.read_bytes()
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(ConfigError, match="git lfs pull"):
            read(copied)
        path.write_bytes(kept[: len(kept) // 2])
        with pytest.raises(ConfigError, match="again"):
            read(copied)
        path.write_bytes(kept)
    video.write_bytes(content)
    read(copied)


@pytest.mark.parametrize("copied", ["v3 video"], indirect=True)
def test_a_format_or_a_field_that_is_not_there_is_named(copied: Path) -> None:
    with pytest.raises(ConfigError, match=r"image=nothing.*there are: "):
        read(copied, data_keys="image=nothing")
    info = lerobot.read_info(copied)
    first, second = info.cameras()
    swapped = read(copied, data_keys=f"image={second},wrist={first},state=none")
    plain = read(copied)
    assert swapped.state is None and plain.state is not None
    assert decode_jpeg(swapped.image_bytes(3)).shape == decode_jpeg(plain.wrist_bytes(3)).shape
    assert swapped.image_bytes(3) == plain.wrist_bytes(3)
    turned = read(copied, rotate_images=True)
    difference = decode_jpeg(turned.image_bytes(3))[::-1, ::-1].astype(int) - decode_jpeg(plain.image_bytes(3))
    assert np.abs(difference).mean() < 1.5
    change_info(copied, codebase_version="v1.6")
    with pytest.raises(ConfigError, match=r"v1\.6.*converter"):
        read(copied)


@pytest.mark.parametrize("copied", ["v2 video", "v3 video"], indirect=True)
@pytest.mark.parametrize("path", ["/dev/zero", "../outside.mp4", "videos/{no_such_name}.mp4"])
def test_a_video_path_stays_within_the_folder(copied: Path, path: str) -> None:
    change_info(copied, video_path=path)
    with pytest.raises(ConfigError, match="video_path"):
        read(copied)


@pytest.mark.parametrize("copied", ["v2 video", "v3 video"], indirect=True)
def test_rows_without_any_time_are_refused(copied: Path) -> None:
    """Otherwise each would be given its video's first frame."""
    change_info(copied, fps=...)
    for path in copied.glob(lerobot.DATA_FILES):
        rewrite(path, lambda table: table.drop_columns(["timestamp"]))
    with pytest.raises(ConfigError, match="add the fps"):
        read(copied)


def test_names_of_dimensions_come_in_three_forms(tmp_path: Path) -> None:
    forms: dict[str, Any] = {
        "list": ["x", "y", "gripper"], "dictionary": {"motors": ["x", "y"], "hand": ["gripper"]}, "one": ["action"], "null": None,
    }  # fmt: skip
    features = {name: {"dtype": "float32", "shape": [3], "names": names} for name, names in forms.items()}
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text(json.dumps({"codebase_version": "v3.0", "features": features}))
    info = lerobot.read_info(tmp_path)
    assert [lerobot.dimension_names(info, [name])[-1:] for name in forms] == [["gripper"], ["gripper"], [], []]


@pytest.mark.parametrize("copied", ["v2 video", "v2 image"], indirect=True)
def test_v2_0_is_v2_1_with_statistics_of_the_whole_which_are_not_believed(copied: Path) -> None:
    before = read(copied)
    (copied / "meta/episodes_stats.jsonl").unlink()
    wrong = {
        "min": [-9.0] * 7,
        "max": [9.0] * 7,
        "mean": [5.0] * 7,
        "std": [3.0] * 7,
        "q01": [-7.0] * 7,
        "q99": [7.0] * 7,
    }
    (copied / "meta/stats.json").write_text(json.dumps({name: wrong for name in lerobot.read_info(copied).features}))
    change_info(copied, codebase_version="v2.0")
    after = read(copied)
    assert after.folder != before.folder and after.fingerprint == before.fingerprint
    assert after.statistics == before.statistics


@pytest.mark.parametrize("copied", ["v3 video"], indirect=True)
def test_quantiles_of_the_set_are_its_rows(copied: Path) -> None:
    cache = read(copied)
    (copied / "meta/stats.json").unlink(missing_ok=True)
    assert read(copied).statistics == cache.statistics
    expected_q99 = np.quantile(cache.actions, np.array(0.99), axis=0)
    assert cache.statistics["action"]["q99"] == expected_q99.tolist()


@pytest.mark.parametrize("copied", ["v3 video", "v3 image"], indirect=True)
def test_a_file_that_only_its_writer_may_read_is_named(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers leave joined mp4 files with mode 0600. The test may run as root, who reads everything: so open refuses here."""
    locked = sorted([*copied.rglob("*.mp4")] or copied.glob(lerobot.DATA_FILES))[-1]
    plain = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=rf"{locked.name} may not be read.*chmod a\+r"):
        read(copied)


# Data sets of the hub


class Hub:
    """A hub of one folder, in the place of huggingface_hub.snapshot_download; remembers what was fetched."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.snapshot, self.fetched = folder, place / "snapshots" / "0123abc", set[str]()

    def __call__(self, repo_id: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert (repo_id, repo_type) == (f"someone/{self.folder.name}", "dataset")
        there = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(there, allow_patterns=allow_patterns):
            self.fetched.add(name)
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, self.snapshot / name)
        return str(self.snapshot)


@pytest.mark.parametrize("copied", ["v2 video", "v3 video", "v3 image"], indirect=True)
def test_a_hub_id_fetches_what_is_read_and_no_more(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("README.md", "videos.zip", "extra/model.safetensors"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("nothing that is read")
    info = lerobot.read_info(copied)
    keys = find_keys(lerobot.fields(info, {}), {}, "")
    assert keys.wrist
    for told, unread in (("", ()), ("wrist=none", (keys.wrist,))):
        hub = Hub(copied, tmp_path / str(len(unread)))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
        cache = open_cache(f"someone/{copied.name}", copied.name, cache_dir=tmp_path / "cache", data_keys=told)
        wanted = {
            str(path.relative_to(copied))
            for room in ("meta", "data", "videos")
            for path in (copied / room).rglob("*")
            if path.is_file() and not any(camera in path.parts for camera in unread)
        }
        assert hub.fetched == wanted
        assert cache.name == copied.name and cache.fingerprint == read(copied, data_keys=told).fingerprint
    with pytest.raises(ConfigError, match=f"give --dataset_name {copied.name}"):
        open_cache(f"someone/{copied.name}", "another", cache_dir=tmp_path / "cache")


def test_a_camera_whose_name_ends_with_another_s_is_left_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "set"
    features = {name: {"dtype": "video", "shape": [8, 8, 3]} for name in ("image", "wrist_image")}
    features["action"] = {"dtype": "float32", "shape": [7]}
    for version, places in ((2, "videos/chunk-000/{}/episode_000000.mp4"), (3, "videos/{}/chunk-000/file-000.mp4")):
        info = {"codebase_version": f"v{version}.0", "features": features}
        files = {name: "" for name in (places.format("image"), places.format("wrist_image"))}
        for name, text in ({"meta/info.json": json.dumps(info)} | files).items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(text)
        hub = Hub(source, tmp_path / str(version))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
        assert lerobot.fetch("someone/set", "wrist=none") == hub.snapshot
        assert hub.fetched == {"meta/info.json", places.format("image")}
        shutil.rmtree(source)


# Videos


def make_video(
    path: Path, codec: str, *, frames: int, fps: int, first_pts: int = 0, b_frames: int = 0, side: int = 64
) -> None:
    """Each frame's brightness is its number, modulo 64."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps, options={"g": "12", "bf": str(b_frames), "crf": "10"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((side, side, 3), 4 * (number % 64), dtype=np.uint8), format="rgb24"
            )
            frame.pts = number + first_pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(("first_pts", "b_frames"), [(0, 0), (0, 3), (7, 3)])
def test_frames_are_found_by_presentation_time(tmp_path: Path, first_pts: int, b_frames: int) -> None:
    make_video(tmp_path / "v.mp4", "libx264", frames=40, fps=10, first_pts=first_pts, b_frames=b_frames)
    with VideoFrames(10) as video:
        for number in (0, 1, 2, 17, 18, 39, 5, 5, 30, 0):  # onward, again, and back
            level = video.at(tmp_path / "v.mp4", float(np.float32(number / 10))).mean()
            assert abs(level - 4 * number) < 2, number
        for absent in (0.05, 4.0):
            with pytest.raises(ConfigError, match=r"no frame at|ends before"):
                video.at(tmp_path / "v.mp4", absent)


def test_a_video_is_decoded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    plain = VideoFrames._open
    monkeypatch.setattr(VideoFrames, "_open", lambda self, path: (opened.append(path), plain(self, path))[1])
    monkeypatch.setattr(VideoFrames, "_back_to", lambda *_: pytest.fail("a video was read twice"))
    open_cache(folder.parent, folder.name, cache_dir=tmp_path)
    assert len(opened) == len(set(opened)) == len(list(folder.rglob("*.mp4")))


MEMORY = """
import re, sys
from pathlib import Path
from prismatic.data.lerobot import build_cache
root = Path(sys.argv[1])
peaks = []
for name in ("short", "long"):
    build_cache(root / name, root / "cache")
    peaks.append(int(re.search("VmHWM:\\\\s+(\\\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)  # getrusage has the parent's
print(peaks[1] - peaks[0])
"""


def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path: Path) -> None:
    """MiB of a process that reads a short set, then a long one. Held frames of the long one would be 80 MiB, and its JPEGs 4 MiB."""
    side, features = (
        224,
        {"image": {"dtype": "video", "shape": [224, 224, 3]}, "action": {"dtype": "float32", "shape": [7]}},
    )
    for name, frames in (("short", 20), ("long", 580)):
        video = tmp_path / name / "videos/chunk-000/image/episode_000000.mp4"
        video.parent.mkdir(parents=True)
        make_video(video, "libx264", frames=frames, fps=10, side=side)
        number = np.arange(frames)
        action = pa.array(np.zeros((frames, 7), np.float32).tolist(), type=pa.list_(pa.float32(), 7))
        columns = {"action": action, "frame_index": number, "episode_index": 0 * number, "task_index": 0 * number}
        (tmp_path / name / "data/chunk-000").mkdir(parents=True)
        pq.write_table(
            pa.table(columns | {"timestamp": (number / 10).astype(np.float32)}),
            tmp_path / name / "data/chunk-000/episode_000000.parquet",
        )
        (tmp_path / name / "meta").mkdir()
        info = {"codebase_version": "v2.1", "fps": 10, "features": features}
        (tmp_path / name / "meta/info.json").write_text(json.dumps(info))
        (tmp_path / name / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "look"}')
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 25, done.stdout
