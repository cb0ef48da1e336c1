"""open_loop.py: the whole policy on recorded frames against what was recorded, beside the training path on the same frames."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prismatic.checkpoint import load_policy
from prismatic.data.frames import FrameCache, Step
from prismatic.episodes.open_loop import open_loop
from prismatic.errors import ConfigError
from prismatic.image import center_crop, decode_jpeg, encode_jpeg
from prismatic.models.vla import VLA, VLAOutput
from prismatic.normalize import normalize
from prismatic.policy import VLAPolicy
from prismatic.processor import Processor
from prismatic.training.metrics import action_errors
from tests.conftest import REPOSITORY
from tests.drawn_cache import write_cache
from tests.drawn_episodes import drawn_episode


@pytest.fixture(scope="module")
def policy() -> VLAPolicy:
    return load_policy(str(REPOSITORY / "checkpoints" / "openvla-tiny"), device="cpu")


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    """The golden frame, pushed a little to the side at each step."""
    return drawn(tmp_path / "cache", (0, 1, 2, 4))


def drawn(folder: Path, numbers: tuple[int, ...]) -> FrameCache:
    frame = np.asarray(Image.open(REPOSITORY / "prismatic" / "scene" / "golden_frame.png").convert("RGB"))
    episodes = [drawn_episode(number) for number in numbers]
    for number, episode in enumerate(episodes):
        steps = range(len(episode["images"]))
        episode["images"] = [encode_jpeg(np.roll(frame, 9 * step + 4 * number, axis=1)) for step in steps]
        episode["wrist_images"] = episode["images"]
        episode["instruction"] = "pick up the black bowl next to the ramekin and place it on the plate"
    return write_cache(folder, episodes, train_episodes=3)


def recorded_steps(cache: FrameCache) -> list[Step]:
    return [cache.step(int(frame)) for frame in cache.validation_indices()]


def recorded_ids(processor: Processor, actions: list[np.ndarray]) -> np.ndarray:
    return processor.action_tokenizer.encode(normalize(np.stack(actions), processor.action_statistics()))


def test_it_equals_the_policy_and_the_training_path(policy: VLAPolicy, cache: FrameCache) -> None:
    splits = open_loop(policy, cache, frames=100)["splits"]
    assert {name: split["frames"] for name, split in splits.items()} == {"train": 2 + 3 + 4, "validation": 6}
    processor, steps = policy.processor, recorded_steps(cache)
    tokenizer = processor.action_tokenizer
    true = recorded_ids(processor, [step.actions[0] for step in steps])
    pictures = [(decode_jpeg(step.image), decode_jpeg(step.wrist or b"")) for step in steps]
    answers = [
        policy.raw_chunks([front], [step.instruction], [wrist])[0, 0]
        for (front, wrist), step in zip(pictures, steps, strict=True)
    ]
    acted = splits["validation"]["policy"]
    assert acted["action_accuracy"] == pytest.approx(np.mean(np.array(answers) == true))
    assert acted["per_dimension"]["action_accuracy"] == pytest.approx(
        np.mean(np.array(answers) == true, axis=0).tolist()
    )
    distance = np.abs(tokenizer.decode(np.array(answers)) - tokenizer.decode(true))
    assert acted["per_dimension"]["l1_loss"] == pytest.approx(distance.mean(axis=0).tolist())
    # fine-tuning's own samples and metrics, but for the crop that stands for its random ones
    samples = [
        processor.example(list(both), step.instruction, step.actions[0], augmentations=[center_crop] * 2)  # type: ignore[arg-type]
        for both, step in zip(pictures, steps, strict=True)
    ]
    batch = processor.collate(samples)
    with torch.no_grad():
        logits = policy.vla(batch.input_ids, batch.attention_mask, batch.pixel_values, batch.labels).logits
    logits[:, : tokenizer.first_id] = -torch.inf
    logits[:, processor.config.vocab_size :] = -torch.inf
    forced = splits["validation"]["teacher_forced"]
    expected = action_errors(VLAOutput(logits), batch, tokenizer).numbers()
    assert forced["action_accuracy"] == pytest.approx(expected["action_accuracy"], abs=1e-6)
    assert forced["l1_loss"] == pytest.approx(expected["l1_loss"], abs=1e-6)


def test_an_instruction_that_training_cuts_is_cut_here_too(policy: VLAPolicy, tmp_path: Path) -> None:
    episode = drawn_episode(1)
    episode |= {"instruction": "pick up the bowl " * 700, "wrist_images": episode["images"]}
    split = open_loop(policy, write_cache(tmp_path / "cache", [episode] * 2), frames=1)["splits"]["train"]
    assert split["frames"] == 1 and np.isfinite(split["policy"]["l1_loss"])


def test_without_a_split_the_share_that_training_held_out_is_counted_apart(policy: VLAPolicy, tmp_path: Path) -> None:
    episode = drawn_episode(1)
    episode |= {"wrist_images": episode["images"]}
    cache, steps = write_cache(tmp_path / "cache", [episode] * 4), len(episode["images"])
    for share, held_out in ((0.5, 2), (0.25, 1), (0.0, 0)):
        splits = open_loop(policy, cache, frames=100, val_share=share)["splits"]
        assert splits.get("validation", {"frames": 0})["frames"] == held_out * steps
        assert splits["train"]["frames"] == (4 - held_out) * steps


def test_an_inference_path_that_is_right_agrees_and_a_wrong_one_does_not(
    policy: VLAPolicy, cache: FrameCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a second JPEG is the only difference that should be: without it not a token may differ
    monkeypatch.setattr("prismatic.image.jpeg_round_trip", lambda frame: frame)
    right = open_loop(policy, cache, frames=6)["splits"]["validation"]
    assert right["same_first_id"] == 1.0
    whole = policy.raw_chunks
    monkeypatch.setattr(policy, "raw_chunks", lambda frames, *more: whole([f[::-1, ::-1] for f in frames], *more))
    assert open_loop(policy, cache, frames=6)["splits"]["validation"]["same_first_id"] < 1.0


@pytest.mark.parametrize("head", ["l1", "parallel"])
def test_of_a_head_that_answers_with_chunks_both_paths_agree(
    head: str, policy: VLAPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small policy with another head, untrained: its chunk is compared with the data's."""
    torch.manual_seed(0)
    config = dataclasses.replace(policy.vla.config, action_head=head, num_actions_chunk=3)
    options = dataclasses.replace(policy.processor.config, action_head=head, num_actions_chunk=3)
    processor = Processor(options, policy.processor.tokenizer, policy.processor.statistics)
    chunked = VLAPolicy(VLA(config).eval(), processor, {})
    cache = drawn(tmp_path / "cache", (2, 3, 4, 5))
    splits = open_loop(chunked, cache, frames=6)["splits"]
    assert splits["validation"]["frames"] == 5  # of 7 steps, those that have a whole chunk
    for split in splits.values():
        assert split["same_first_id"] == 1.0
        assert ("action_accuracy" in split["policy"]) == (head == "parallel")
        assert split["policy"]["l1_loss"] == pytest.approx(split["teacher_forced"]["l1_loss"], abs=0.01)
        assert len(split["policy"]["per_dimension"]["l1_loss"]) == 7
    whole, last = chunked.raw_chunks, 9 if head == "l1" else processor.action_tokenizer.first_id

    def another_last(*views: Any) -> np.ndarray:
        chunks = whole(*views)
        chunks[:, -1] = last
        return chunks

    monkeypatch.setattr(chunked, "raw_chunks", another_last)
    other = open_loop(chunked, cache, frames=6)["splits"]["validation"]
    assert other["policy"]["l1_loss"] != splits["validation"]["policy"]["l1_loss"]  # all actions of the chunk count


@pytest.mark.parametrize("lacking", ["min", "max", "a number of each"])
def test_statistics_that_cannot_normalise_the_data_are_named(
    policy: VLAPolicy, cache: FrameCache, lacking: str
) -> None:
    (key,) = policy.processor.statistics
    columns = dict(policy.processor.statistics[key]["action"])
    if columns.pop(lacking, None) is None:
        columns = {name: column[1:] for name, column in columns.items()}
    processor = Processor(policy.processor.config, policy.processor.tokenizer, {key: {"action": columns}})
    with pytest.raises(ConfigError, match=rf"action\.{lacking} is missing|actions of 7 numbers, this policy's have 6"):
        open_loop(VLAPolicy(policy.vla, processor, {}), cache, frames=1)


def test_a_policy_that_answers_with_nan_has_no_accuracy(
    policy: VLAPolicy, cache: FrameCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan(*views: Any) -> np.ndarray:
        policy.last_margins = np.array([np.nan])
        return np.full((len(views[0]), 1, 7), policy.processor.action_tokenizer.first_id)

    monkeypatch.setattr(policy, "raw_chunks", nan)
    with pytest.raises(ConfigError, match="NaN or infinity"):
        open_loop(policy, cache, frames=2)
