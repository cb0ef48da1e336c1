"""The frame cache, read from a folder made here, and the order in which mixtures give their frames."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from prismatic.data.examples import draw_batches
from prismatic.data.frames import FrameCache, Mixture, num_train_episodes
from prismatic.data.mixture import names_and_weights
from prismatic.errors import ConfigError
from prismatic.normalize import normalize
from tests.drawn_cache import write_cache

LENGTHS = [3, 2, 4, 2, 5, 3, 2, 4, 3, 2, 3]  # steps per episode; round(0.95 · 11) = 10 are for training
SILENT_EPISODE = 2
HALF_SILENT_EPISODE = 4  # only its first step has no instruction


def image_of(name: str, frame: int, view: str = "image") -> bytes:
    """What begins like a JPEG is stored as it is."""
    return b"\xff\xd8" + f"{view} {frame} of {name}".encode() + b"\xff\xd9"


def make_cache(folder: Path, lengths: list[int], *, wrist: bool = True) -> FrameCache:
    """A cache of the folder's name, whose images are words, and whose instruction is empty in the two places above."""
    name, generator, start, episodes = folder.name, np.random.default_rng(0), 0, []
    for number, length in enumerate(lengths):
        frames = range(start, start := start + length)
        action = generator.normal(size=(length, 7))
        action[:, 6] = np.sign(action[:, 6])
        silent = {SILENT_EPISODE: length, HALF_SILENT_EPISODE: 1}.get(number, 0)
        episode = {"action": action, "instruction": [""] * silent + [f"do {name}"] * (length - silent)}
        episode["images"] = [image_of(name, frame) for frame in frames]
        if wrist:
            episode["wrist_images"] = [image_of(name, frame, "wrist_image") for frame in frames]
        episodes.append(episode)
    return write_cache(folder, episodes, name=name)


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return make_cache(tmp_path / "one", LENGTHS)


@pytest.fixture
def pair(tmp_path: Path) -> list[FrameCache]:
    """20 and 10 training frames."""
    return [make_cache(tmp_path / name, [frames, 0]) for name, frames in (("big", 20), ("small", 10))]


def drawn(mixture: Mixture, start: int, end: int) -> list[tuple[int, int]]:
    return [mixture.locate(draw) for draw in range(start, end)]


# The cache


@pytest.mark.parametrize("wrist", [True, False])
def test_every_frame_has_its_own_bytes_and_row(tmp_path, wrist):
    cache = make_cache(tmp_path / "one", LENGTHS, wrist=wrist)
    assert len(cache) == sum(LENGTHS)
    copy = pickle.loads(pickle.dumps(cache))  # as a loader's process gets it: by its path
    for frame in (0, 3, 7, len(cache) - 1):
        step = copy.step(frame)
        assert (step.dataset, step.image, step.instruction) == ("one", image_of("one", frame), cache.instruction(frame))
        assert step.wrist == (image_of("one", frame, "wrist_image") if wrist else None)
        assert (step.actions == cache.actions[frame : frame + 1]).all() and step.actions.dtype == np.float32
    for outside in (-1, len(cache)):
        with pytest.raises(IndexError):
            cache.image_bytes(outside)
    if not wrist:
        with pytest.raises(ConfigError, match=r"no wrist_image.*num_images_in_input"):
            cache.wrist_bytes(5)


def test_silent_episodes_and_the_last_five_percent_are_left_out_of_training(cache):
    trained = set(range(10)) - {SILENT_EPISODE}
    assert set(cache.episode[cache.train_indices()]) == trained
    assert len(cache.train_indices()) == sum(LENGTHS[episode] for episode in trained)
    assert cache.validation_indices().tolist() == [30, 31, 32]
    assert cache.instructions == ["" if e in (SILENT_EPISODE, HALF_SILENT_EPISODE) else "do one" for e in range(11)]
    rounded_half_to_even = {1: 1, 6: 6, 10: 10, 11: 10, 30: 28, 432: 410, 500: 475}
    assert {episodes: num_train_episodes(episodes) for episodes in rounded_half_to_even} == rounded_half_to_even


def test_another_share_can_be_held_out(cache, pair):
    validation = cache.validation_indices(0.4)
    assert set(cache.episode[validation]) == {7, 8, 9, 10} and not set(validation) & set(cache.train_indices(0.4))
    assert len(cache.validation_indices(0)) == 0 and len(cache.train_indices(0.999)) == LENGTHS[0]
    mixture = Mixture(pair, seed=0, val_share=0.5)
    assert mixture.held_out(10**6) == [] and len(mixture) == 30  # the only episode with words is learnt
    mixture = Mixture([cache], seed=0, val_share=0.4)
    assert mixture.held_out(10**6) == [(0, frame) for frame in validation]
    assert mixture.held_out(2) == [(0, validation[0]), (0, validation[-1])]


def test_statistics_count_every_episode_and_each_data_set_keeps_its_own(cache, pair):
    statistics = cache.statistics
    assert (statistics["num_transitions"], statistics["num_trajectories"]) == (sum(LENGTHS), len(LENGTHS))
    assert statistics["action"]["max"] == cache.actions.max(0).tolist()
    assert Mixture(pair, seed=0).statistics == {"big": pair[0].statistics, "small": pair[1].statistics}


def test_a_cache_of_the_first_format_stays_readable(cache):
    path = cache.folder / "meta.json"
    meta = json.loads(path.read_text())
    for name in ("gripper", "action_names", "fps", "notes"):
        del meta[name]
    path.write_text(json.dumps(meta | {"format": 1}))
    with np.load(cache.folder / "steps.npz") as arrays:
        kept = {name: arrays[name] for name in arrays.files if name not in ("crc", "meta_digest")}
    np.savez(cache.folder / "steps.npz", **kept)
    old = FrameCache(cache.folder)
    assert (old.actions == cache.actions).all() and old.statistics == cache.statistics
    assert [old.image_bytes(frame) for frame in range(len(old))] == [cache.image_bytes(f) for f in range(len(cache))]


# Chunks of actions


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_a_chunk_ends_with_its_episode(cache, chunk):
    frames = cache.train_indices(num_actions_chunk=chunk)
    kept = [length for episode, length in enumerate(LENGTHS[:10]) if episode != SILENT_EPISODE]
    assert len(frames) == sum(max(0, length - chunk + 1) for length in kept)
    for frame in frames.tolist():
        step = cache.step(frame, chunk)
        assert step.actions.shape == (chunk, 7) and (step.actions == cache.actions[frame : frame + chunk]).all()
        assert set(cache.episode[frame : frame + chunk]) == {cache.episode[frame]}
    assert cache.episodes_shorter_than(chunk) == sum(length < chunk for length in LENGTHS)


def test_chunks_and_state_are_the_original_s(both_numbers, tmp_path):
    """Which frames give a chunk, what is in it, the state beside it and the statistics of both, from the raw arrays of the data set."""
    plain, oft = both_numbers
    facts = json.loads((oft / "data.json").read_text())
    arrays, raw = np.load(oft / "data.npz"), np.load(plain / "rlds_pipeline.npz")
    lengths = arrays["episode_length"].tolist()
    ends = np.cumsum(lengths)
    episodes = [
        {
            "images": [b"\xff\xd8\xff\xd9"] * n, "action": raw["raw_action"][end - n : end],
            "state": arrays["all_state_raw"][end - n : end], "instruction": said,
        }
        for n, end, said in zip(lengths, ends, facts["episode_instructions_in_order"], strict=True)
    ]  # fmt: skip
    cache = write_cache(tmp_path / "cache", episodes)
    chunk = arrays["chunk_action"].shape[1]
    frames = cache.train_indices(val_share=0, num_actions_chunk=chunk)
    assert cache.episode[frames].tolist() == arrays["chunk_episode"].tolist()
    assert cache.timestep[frames].tolist() == arrays["chunk_timestep"].tolist()

    (expected,) = json.loads((oft / "rlds_dataset_statistics.json").read_text()).values()
    statistics = cache.statistics
    for part in ("action", "proprio"):
        assert list(statistics[part]) == list(expected[part])
        for name, values in expected[part].items():
            tolerance = 1e-6 if name in ("mean", "std") else 0
            np.testing.assert_allclose(statistics[part][name], values, rtol=0, atol=tolerance, err_msg=f"{part} {name}")
    assert statistics["num_transitions"] == expected["num_transitions"]

    steps = [cache.step(int(frame), chunk) for frame in frames]
    actions = np.stack([normalize(np.asarray(step.actions), statistics["action"]) for step in steps])
    np.testing.assert_allclose(actions, arrays["chunk_action"], rtol=0, atol=1e-6)
    states = np.stack([normalize(np.asarray(step.state), statistics["proprio"]) for step in steps])
    np.testing.assert_allclose(states[:, None], arrays["chunk_proprio"], rtol=0, atol=1e-6)


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


def test_mixtures_that_make_no_sense_are_refused(cache, pair, tmp_path):
    silent = make_cache(tmp_path / "silent", [0, 0, 4])
    bad_weights = ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, 1e9], [1.0, 1e300])
    for caches, weights, sentence in (
        *((pair, weights, "a weight above 0 for each") for weights in bad_weights),
        ([pair[0], pair[0]], None, "two data sets of one name"),
        ([silent], None, "no training episode of silent"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            Mixture(caches, seed=0, weights=weights)
    for weight in ("0", "-1", "nan", "1e9", "1e300", "much"):
        with pytest.raises(ConfigError, match=f"'b:{weight}': '{weight}' is no weight above 0"):
            names_and_weights(f"a,b:{weight}")
    with pytest.raises(ConfigError, match=r"no training episode of one has .* 6 steps"):
        Mixture([cache], seed=0, num_actions_chunk=6)


def test_ranks_share_the_batches_without_repeats():
    ranks = [draw_batches(batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    assert np.array_equal([next(rank) for _ in range(2) for rank in ranks], np.arange(12).reshape(4, 3))
    resumed = draw_batches(batch_size=3, first=1, rank=1, world_size=2)
    assert [next(resumed), next(resumed)] == [[9, 10, 11], [15, 16, 17]]


def test_batches_of_workers_are_the_draws(cache):
    mixture = Mixture([cache], seed=3)
    loader = DataLoader(
        mixture,  # pyright: ignore[reportArgumentType]  (any object with __getitem__ serves)
        batch_sampler=draw_batches(batch_size=4, first=2),
        num_workers=2,
        collate_fn=list,
    )
    batches = iter(loader)
    images = [[step.image for step in next(batches)] for _ in range(3)]
    assert images == [[mixture[draw].image for draw in range(4 * step, 4 * step + 4)] for step in (2, 3, 4)]


def test_where_episodes_stand_task_after_task_what_is_held_out_is_drawn(tmp_path: Path) -> None:
    image, action = image_of("one", 0), np.zeros((1, 7))
    episodes = [{"images": [image], "action": action, "instruction": f"task {n // 5}"} for n in range(50)]
    cache = write_cache(tmp_path / "one", episodes, in_order=True)
    held_out = {cache.instruction(frame) for frame in cache.validation_indices(0.2)}
    assert len(cache.validation_indices(0.2)) == 10 and len(held_out) > 4
    assert len({cache.instruction(frame) for frame in cache.train_indices(0.2)}) == 10
    both = np.concatenate([cache.train_indices(0.2), cache.validation_indices(0.2)])
    assert sorted(both.tolist()) == list(range(50))
    split = write_cache(tmp_path / "two", episodes, in_order=True, train_episodes=40)  # the data set's own word counts
    assert split.validation_indices(0.2).tolist() == list(range(40, 50))
