"""The frame cache, read from a folder made here, and the order in which mixtures give their frames."""

import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from prismatic.data.frames import CACHE_FORMAT, DrawBatches, FrameCache, Mixture, num_train_episodes
from prismatic.errors import ConfigError

LENGTHS = [3, 2, 4, 2, 5, 3, 2, 4, 3, 2, 3]  # steps per episode; round(0.95 · 11) = 10 are for training
SILENT_EPISODE = 2
HALF_SILENT_EPISODE = 4  # only its first step has no instruction


def image_of(name: str, frame: int, view: str = "image") -> bytes:
    return f"{view} {frame} of {name}".encode()


def make_cache(
    folder: Path, name: str, lengths: list[int], *, views: tuple[str, ...] = ("image", "wrist_image")
) -> Path:
    """A cache folder whose "images" are words, and whose instruction is empty in two of the places above."""
    folder.mkdir(parents=True)
    frames = sum(lengths)
    episode = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    timestep = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    silent = (episode == SILENT_EPISODE) | ((episode == HALF_SILENT_EPISODE) & (timestep == 0))
    action = np.random.default_rng(0).normal(size=(frames, 7)).astype(np.float32)
    action[:, 6] = np.sign(action[:, 6])
    images = [image_of(name, frame, view) for frame in range(frames) for view in views]
    (folder / "frames.bin").write_bytes(b"".join(images))
    np.savez(
        folder / "steps.npz",
        offsets=np.cumsum([0, *map(len, images)]),
        action=action,
        episode=episode,
        timestep=timestep,
        instruction=np.where(silent, 0, 1).astype(np.int32),
    )
    meta = {
        "format": CACHE_FORMAT,
        "name": name,
        "fingerprint": f"content of {name}",
        "train_episodes": None,
        "images": views,
        "instructions": ["", f"do {name}"],
        "file_paths": [f"demo_{number}" for number in range(len(lengths))],
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return FrameCache(make_cache(tmp_path / "one", "one", LENGTHS))


@pytest.fixture
def pair(tmp_path: Path) -> list[FrameCache]:
    """20 and 10 training frames."""
    folders = (make_cache(tmp_path / name, name, [frames, 0]) for name, frames in (("big", 20), ("small", 10)))
    return [FrameCache(folder) for folder in folders]


def drawn(mixture: Mixture, start: int, end: int) -> list[tuple[int, int]]:
    return [mixture.locate(draw) for draw in range(start, end)]


# The cache


def test_every_frame_has_its_own_bytes_and_row(cache):
    assert len(cache) == sum(LENGTHS)
    for frame in (0, 7, len(cache) - 1):
        assert cache.image_bytes(frame) == image_of("one", frame)
        assert cache.wrist_bytes(frame) == image_of("one", frame, "wrist_image")
    step = cache[3]
    assert (step.dataset, step.image, step.wrist) == (
        "one",
        image_of("one", 3),
        image_of("one", 3, "wrist_image"),
    )
    assert step.instruction == "do one"
    assert (step.actions == cache.actions[3:4]).all() and step.actions.dtype == np.float32
    with pytest.raises(IndexError):
        cache.image_bytes(len(cache))
    with pytest.raises(IndexError):
        cache.image_bytes(-1)


def test_actions_have_the_gripper_open_at_one(cache):
    with np.load(cache.folder / "steps.npz") as arrays:
        raw = arrays["action"]
    assert (cache.actions[:, 6] == np.where(raw[:, 6] < 0, 1, 0)).all()
    assert (cache.actions[:, :6] == raw[:, :6]).all()


def test_a_cache_without_wrist_images(tmp_path):
    cache = FrameCache(make_cache(tmp_path / "one", "one", LENGTHS, views=("image",)))
    assert cache.image_bytes(5) == image_of("one", 5) and cache[5].wrist is None
    with pytest.raises(ConfigError, match="no wrist_image"):
        cache.wrist_bytes(5)


def test_silent_episodes_and_the_last_five_percent_are_left_out_of_training(cache):
    trained = set(range(10)) - {SILENT_EPISODE}
    assert set(cache.episode[cache.train_indices()]) == trained
    assert len(cache.train_indices()) == sum(LENGTHS[episode] for episode in trained)
    assert cache.validation_indices().tolist() == [30, 31, 32]
    assert cache.instructions == ["" if e in (SILENT_EPISODE, HALF_SILENT_EPISODE) else "do one" for e in range(11)]


@pytest.mark.parametrize(("episodes", "train"), [(1, 1), (6, 6), (10, 10), (11, 10), (30, 28), (432, 410), (500, 475)])
def test_train_split_rounds_half_to_even(episodes, train):
    assert num_train_episodes(episodes) == train


def test_another_share_can_be_held_out(cache, pair):
    validation = cache.validation_indices(0.4)
    assert set(cache.episode[validation]) == {7, 8, 9, 10} and not set(validation) & set(cache.train_indices(0.4))
    assert len(cache.validation_indices(0)) == 0 and len(cache.train_indices(0.999)) == LENGTHS[0]
    mixture = Mixture(pair, seed=0, val_share=0.5)
    learnt = {mixture.locate(draw) for draw in range(2 * len(mixture))}
    assert mixture.held_out(10**6) == [] and len(learnt) == len(mixture)  # the only episode with words is learnt
    mixture = Mixture([cache], seed=0, val_share=0.4)
    assert mixture.held_out(10**6) == [(0, frame) for frame in validation]
    assert mixture.held_out(2) == [(0, validation[0]), (0, validation[-1])]


def test_statistics_count_every_episode(cache):
    statistics = cache.statistics
    assert (statistics["num_transitions"], statistics["num_trajectories"]) == (sum(LENGTHS), len(LENGTHS))
    assert statistics["action"]["max"] == cache.actions.max(0).tolist()


def test_a_copy_in_another_process_reads_the_same(cache):
    assert cache.image_bytes(4) == image_of("one", 4)  # the file is open when the cache is sent
    assert len(pickle.dumps(cache)) < 500
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(cache.wrist_bytes, (9,)) == cache.wrist_bytes(9)


@pytest.mark.parametrize("damage", ["no meta", "cut frames", "cut steps", "other format"])
def test_damaged_caches_are_refused(cache, damage):
    if damage == "no meta":
        (cache.folder / "meta.json").unlink()
    elif damage == "cut frames":
        (cache.folder / "frames.bin").write_bytes(b"short")
    elif damage == "cut steps":
        (cache.folder / "steps.npz").write_bytes((cache.folder / "steps.npz").read_bytes()[:500])
    else:
        meta = json.loads((cache.folder / "meta.json").read_text())
        (cache.folder / "meta.json").write_text(json.dumps(meta | {"format": CACHE_FORMAT + 1}))
    with pytest.raises(ConfigError, match="delete it and run again"):
        FrameCache(cache.folder)


# The order of draws


def test_an_epoch_is_every_training_frame_once_in_a_new_order(cache):
    mixture = Mixture([cache], seed=1)
    frames = cache.train_indices().tolist()
    assert len(mixture) == len(frames)
    epochs = [[frame for _, frame in drawn(mixture, e * len(frames), (e + 1) * len(frames))] for e in range(3)]
    assert all(sorted(epoch) == frames for epoch in epochs)
    assert epochs[0] != frames and epochs[0] != epochs[1] != epochs[2]
    assert mixture[5].image == cache.image_bytes(epochs[0][5])


def test_draws_depend_on_the_seed_and_their_number_alone(cache):
    once, again = drawn(Mixture([cache], seed=1), 0, 100), Mixture([cache], seed=1)
    assert [again.locate(draw) for draw in reversed(range(100))] == once[::-1]
    assert drawn(Mixture([cache], seed=2), 0, 100) != once


def test_weights_set_the_share_of_each_data_set(pair):
    plain = Mixture(pair, seed=0)
    assert len(plain) == 30
    assert [dataset for dataset, _ in drawn(plain, 0, 30)].count(0) == 20

    weighted = Mixture(pair, seed=0, weights=[0.5, 2])
    assert len(weighted) == 10 + 20
    first, second = drawn(weighted, 0, 30), drawn(weighted, 30, 60)
    big = [frame for dataset, frame in first + second if dataset == 0]
    assert sorted(big) == list(range(20))  # two epochs of a half: no frame again before all came
    small = [frame for dataset, frame in first if dataset == 1]
    assert sorted(small) == sorted([*range(10), *range(10)])
    assert {dataset for dataset, _ in first[:15]} == {0, 1}  # mixed, not one after the other


def test_each_data_set_keeps_its_own_statistics(pair):
    statistics = Mixture(pair, seed=0).statistics
    assert list(statistics) == ["big", "small"]
    assert statistics["small"] == pair[1].statistics != statistics["big"]


def test_mixtures_that_make_no_sense_are_refused(pair, tmp_path):
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ConfigError, match="a weight above 0 for each"):
            Mixture(pair, seed=0, weights=weights)
    with pytest.raises(ConfigError, match="two data sets of one name"):
        Mixture([pair[0], pair[0]], seed=0)
    silent = FrameCache(make_cache(tmp_path / "silent", "silent", [0, 0, 4]))
    with pytest.raises(ConfigError, match="no training episode of silent"):
        Mixture([silent], seed=0)


def test_ranks_share_the_batches_without_repeats():
    ranks = [DrawBatches(batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    assert [rank.batch(step) for step in range(2) for rank in ranks] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9, 10, 11],
    ]
    resumed = iter(DrawBatches(batch_size=3, first=1, rank=1, world_size=2))
    assert [next(resumed), next(resumed)] == [[9, 10, 11], [15, 16, 17]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_any_number_of_workers(cache, workers):
    mixture = Mixture([cache], seed=3)
    loader = DataLoader(
        mixture,  # pyright: ignore[reportArgumentType]  (any object with __getitem__ serves)
        batch_sampler=DrawBatches(batch_size=4, first=2),
        num_workers=workers,
        collate_fn=list,
    )
    batches = iter(loader)
    images = [[step.image for step in next(batches)] for _ in range(3)]
    assert images == [[mixture[draw].image for draw in range(4 * step, 4 * step + 4)] for step in (2, 3, 4)]
