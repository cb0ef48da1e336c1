"""The table of what quantising changes: its numbers by hand, teacher forcing against generating, and which frames count as held out."""

from pathlib import Path

import numpy as np
import pytest

from prismatic.bench import precision
from prismatic.checkpoint import load_policy
from prismatic.data.frames import FrameCache
from prismatic.data.writer import CacheWriter
from prismatic.episodes.open_loop import as_acting
from prismatic.errors import ConfigError
from prismatic.models.tiny import TINY, random_vla
from prismatic.processor import Processor
from tests.conftest import REPOSITORY
from tests.drawn_episodes import drawn_jpeg

CHECKPOINTS = REPOSITORY / "checkpoints"
EPISODES, STEPS = 20, 8  # round(0.95 · 20) = 19 are for training


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load_policy(CHECKPOINTS / "openvla-tiny", device="cpu").processor


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FrameCache:
    folder = tmp_path_factory.mktemp("cache")
    frames = EPISODES * STEPS
    jpegs = [drawn_jpeg(frame % 9, view) for frame in range(frames) for view in (1, 2)]
    action = np.clip(np.random.default_rng(0).normal(size=(frames, 7)), -1, 1).astype(np.float32)
    writer = CacheWriter(folder, name="demo")
    for start in range(0, frames, STEPS):
        views = [jpegs[2 * frame : 2 * frame + 2] for frame in range(start, start + STEPS)]
        said = [("go", "put it on the plate")[frame % 2] for frame in range(start, start + STEPS)]
        state = np.zeros((STEPS, 8), np.float32)
        writer.add(views, action=action[start : start + STEPS], instructions=said, state=state)
    writer.finish()
    return FrameCache(folder)


def test_held_out_frames(cache: FrameCache) -> None:
    assert precision.spread(cache, 2, every_episode=False).tolist() == [152, 159]
    assert precision.spread(cache, 3, every_episode=True).tolist() == [0, 80, 159]
    assert precision.spread(cache, 1, every_episode=False, chunk=8).tolist() == [152]
    assert precision.spread(cache, 2, every_episode=False, val_share=0.5).tolist() == [80, 159]
    with pytest.raises(ConfigError, match="8 held-out frames, fewer than --num_frames 1000"):
        precision.spread(cache, 1000, every_episode=False)


def test_behind_its_own_tokens_forcing_is_generating(cache: FrameCache, processor: Processor) -> None:
    """Demonstrate what the model itself would do: each place then predicts what generating chose there."""
    vla = random_vla(TINY, seed=3).eval()
    batch = as_acting([cache.step(frame, 1) for frame in range(6)], processor)
    prompts = batch.labels[:, :] == -100
    prompts &= batch.attention_mask
    answer = vla.generate_action_ids(batch.input_ids * prompts, batch.pixel_values, 7, prompts)
    for row, ids in zip(range(6), answer, strict=True):
        start = int(prompts[row].sum())
        batch.input_ids[row, start : start + 7] = ids
    assert len({int(count) for count in prompts.sum(1)}) == 2  # instructions of two lengths
    forced = precision.answers(vla, [batch], processor.action_tokenizer)
    np.testing.assert_array_equal(forced[:, 0], processor.action_tokenizer.decode(answer.numpy()))


def test_a_row_by_hand(processor: Processor) -> None:
    tokenizer = processor.action_tokenizer
    reference = tokenizer.encode(np.zeros((2, 2, 7)))  # two chunks of two actions
    ids = reference.copy()
    ids[0, 0, 2] += 3
    plain, actions = tokenizer.decode(reference), tokenizer.decode(ids)
    row = precision.row("x", random_vla(TINY, seed=0), actions, plain, plain, tokenizer)
    assert row["% of float32"] == 100 and row["frames"] == 2
    assert row["tokens alike %"] == round(100 * 27 / 28, 2) and row["actions alike %"] == 75
    assert row["alike % by dimension"] == [100, 100, 75, 100, 100, 100, 100]
    step = abs(float((actions - plain)[0, 0, 2]))
    assert row["L1 to unquantised"] == round(step / 28, 5) and row["its dimensions"][2] == round(step / 4, 4)
    assert row["L1 to demonstrated"] == row["L1 to unquantised"]


@pytest.mark.parametrize("checkpoint", ["openvla-tiny", "openvla-tiny-oft"])
def test_every_way_has_a_row(
    checkpoint: str, cache: FrameCache, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {}
    monkeypatch.setattr(precision, "open_cache", lambda root, name, **how: told.update(how) or cache)
    found = precision.run(
        str(CHECKPOINTS / checkpoint), adapter=None, unnorm_key=None, data_root_dir=Path(), dataset_name="", cache_dir=Path(),
        held_out="validation", num_frames=10, batch_size=10, data_keys="wrist=a", gripper="none", rotate_images=True, val_share=0.5,
    )  # fmt: skip
    assert told == {"cache_dir": Path(), "data_keys": "wrist=a", "gripper": "none", "rotate_images": True}
    rows = {row["what"]: row for row in found}
    assert list(rows) == ["none", *precision.WAYS]
    assert rows["none"]["tokens alike %"] == 100 and rows["none"]["L1 to unquantised"] == 0
    assert rows["int8"]["L1 to unquantised"] < rows["int4"]["L1 to unquantised"]
    if checkpoint == "openvla-tiny":
        assert rows["int8"]["tokens alike %"] > 90
    else:  # a regression's numbers move a little, and cross a bin's edge as often as they lie near one
        half_a_bin = np.diff(processor.action_tokenizer.centers[:2])[0] / 2
        assert rows["int8"]["L1 to unquantised"] < half_a_bin < rows["int4"]["L1 to unquantised"]
    sizes = [rows[name]["MB"] for name in ("int8, image towers too", "int8", "none")]
    assert sizes == sorted(sizes)
