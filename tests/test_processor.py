"""The waist: ids and labels of the original's sentences, prompts, batches, and that learning and acting see the same pixels."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from prismatic import image
from prismatic.augmentation import Augmentation
from prismatic.checkpoint import is_its_own
from prismatic.errors import ConfigError
from prismatic.filenames import PREPROCESSOR, PROCESSOR, STATISTICS, TOKENIZER
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import bin_centers
from prismatic.processor import IGNORE, MAX_LENGTH, PROMPT, Processor, ProcessorConfig
from prismatic.processor_files import check_tokenizer, load_processor, load_tokenizer
from prismatic.processor_json import read_processor
from prismatic.ranges import ActionHead
from prismatic.sums import write_sums
from prismatic.training.first_batch import images_of
from tests.conftest import REPOSITORY
from tests.drawn_checkpoint import ENTRY, drawn_processor

COMMITTED = REPOSITORY / "checkpoints" / "openvla-tiny"


@pytest.fixture(scope="module")
def tiny() -> Processor:
    return drawn_processor()


def test_ids_and_labels_of_every_sentence(reference: Path) -> None:
    plain = {"q01": [-1.0] * 7, "q99": [1.0 - 1e-8] * 7, "min": [-1.0] * 7, "max": [1.0] * 7, "mask": [False] * 7}
    config = ProcessorConfig("plain", False)
    processor = Processor(config, load_tokenizer(reference / "checkpoint"), {"plain": {"action": plain}})
    picture = np.zeros((224, 224, 3), np.uint8)
    for case in json.loads((reference / "train_text.json").read_text()):
        example = processor.example([picture], case["instruction"], np.array(case["action_float32"], np.float32))
        assert example.input_ids.tolist() == case["input_ids"], case["instruction"]
        assert example.labels.tolist() == case["labels"], case["instruction"]
        assert processor.tokenizer(case["eval_prompt"]).input_ids == case["eval_input_ids"]
        prompt = processor.prompt_ids(case["instruction"])
        assert (prompt == case["input_ids"][: len(prompt)]) == case["eval_plus_29871_is_prefix_of_train"]


def test_prompts_of_predict_action(reference: Path) -> None:
    for case in json.loads((reference / "generate.json").read_text()):
        processor = load_processor(reference / "checkpoint", unnorm_key=case["unnorm_key"])
        assert processor.tokenizer(case["prompt"]).input_ids == case["processor_input_ids"]
        assert processor.prompt_ids(case["instruction"]) == case["ids_fed_to_generate"]
        assert processor.action_dim == len(case["action"])


def test_a_row_too_long_for_the_model_loses_words_and_no_action(tiny: Processor) -> None:
    picture, action = [np.zeros((256, 256, 3), np.uint8)] * 2, np.linspace(-1, 1, 7, dtype=np.float32)
    short, long = (tiny.example(picture, "pick up the bowl " * n, action) for n in (1, 2000))
    assert len(short.input_ids) < MAX_LENGTH - 50 < len(long.input_ids) <= MAX_LENGTH
    assert long.input_ids[-9:].tolist() == short.input_ids[-9:].tolist()  # the empty token, the action, the end
    assert long.input_ids[:10].tolist() == short.input_ids[:10].tolist()
    assert (long.labels != IGNORE).sum() == (short.labels != IGNORE).sum() == 8


def test_an_instruction_too_long_to_act_on_is_refused(tiny: Processor) -> None:
    with pytest.raises(ConfigError, match=r"the prompt has 3,\d+ tokens, and the model reads 2,048"):
        tiny.inputs([np.zeros((9, 9, 3), dtype=np.uint8)], "q" * 3000)


def test_only_the_actions_and_the_end_are_learnt(tiny: Processor) -> None:
    example = tiny.example([np.zeros((256, 256, 3), np.uint8)] * 2, "Pick up the BOWL", np.zeros(7, np.float32))
    learnt = example.labels != IGNORE
    assert example.labels[learnt].equal(example.input_ids[learnt]) and learnt.sum() == 8 and example.input_ids[-1] == 2
    assert example.input_ids[-9] == TINY.empty_token_id
    assert tiny.prompt_ids("Pick up the BOWL") == example.input_ids[:-8].tolist() == tiny.prompt_ids("pick up the bowl")


def test_learning_and_acting_see_the_same_pixels(tiny: Processor) -> None:
    frame = np.random.default_rng(0).integers(0, 255, (256, 256, 3)).astype(np.uint8)
    recorded = image.jpeg_round_trip(frame)
    side = float(np.sqrt(np.float32(image.CROP_AREA)))
    start = (1 - side) / 2
    centre = Augmentation(crop_box=(start, start, start + side, start + side))
    learnt = tiny.example(
        [recorded, recorded], "go", np.zeros(7, np.float32), augmentations=[centre, centre]
    ).pixel_values
    _, acted = tiny.inputs([frame, frame], "go")
    assert learnt.shape == acted.shape == (12, 128, 128)
    assert (learnt != acted).float().mean() < 1e-3  # a value on the edge between two levels may fall either way


def test_batches_are_padded_on_the_right_and_can_be_pinned(tiny: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = [np.zeros((128, 128, 3), np.uint8)] * 2
    examples = [tiny.example(picture, words, np.zeros(7, np.float32)) for words in ("go", "pick up the black bowl now")]
    batch = tiny.collate(examples)
    short = len(examples[0].input_ids)
    assert (batch.input_ids[0, short:] == TINY.pad_token_id).all() and (batch.labels[0, short:] == IGNORE).all()
    assert batch.attention_mask.sum(1).tolist() == [len(e.input_ids) for e in examples]
    assert batch.pixel_values.shape == (2, 12, 128, 128)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # there is no GPU to pin for
    pinned = pin_memory(batch)
    assert isinstance(pinned, type(batch)) and torch.equal(pinned.input_ids, batch.input_ids + 1)


def test_actions_come_back_within_half_a_bin(tiny: Processor) -> None:
    action = np.random.default_rng(0).uniform(-1, 1, (50, 7))
    ids = tiny.action_tokenizer.encode(action)
    assert np.abs(tiny.actions(ids) - action).max() <= 1 / 255 + 1e-6


def test_words_it_never_saw_are_spelled_not_lost(tiny: Processor) -> None:
    ids = tiny.prompt_ids("schraube die mutter fest €")
    assert tiny.tokenizer.decode(ids[1:-1]) == PROMPT.format(instruction="schraube die mutter fest €")
    assert max(ids) < TINY.vocab_size - 256


def test_a_chunk_and_a_state_are_learnt_as_they_are_acted_on() -> None:
    config = dataclasses.replace(TINY, action_head="l1", num_actions_chunk=3, proprio_dim=2)
    proprio = {"q01": [0.0, 1.0], "q99": [2.0, 1.0], "min": [0.0, 1.0], "max": [2.0, 1.0]}
    processor = drawn_processor(config, "demo", {"demo": ENTRY | {"proprio": proprio}})
    frames = [np.zeros((128, 128, 3), np.uint8)] * 2
    actions = np.linspace(-1, 1, 21, dtype=np.float32).reshape(3, 7)
    state = np.array([1.5, 7.0], np.float32)
    batch = processor.collate([processor.example(frames, text, actions, state=state) for text in ("go", "go there")])
    assert batch.actions is not None and batch.proprio is not None
    assert batch.actions.shape == (2, 3, 7) and (batch.labels != IGNORE).sum(1).tolist() == [22, 22]
    np.testing.assert_allclose(batch.proprio, [[0.5, 0.0]] * 2, atol=1e-6)  # what never changes is 0
    acted = processor.proprio([state, state])
    assert acted is not None and torch.equal(acted, batch.proprio)
    np.testing.assert_allclose(processor.unnormalize(batch.actions[0].numpy()), actions, atol=1e-6)
    with pytest.raises(ConfigError, match="reads a robot state of 2 numbers, but none is given"):
        processor.example(frames, "go", actions)


@pytest.mark.parametrize(("head", "stop_token"), [("l1", True), ("l1", False), ("parallel", False)])
def test_the_end_token_is_learnt_with_where_it_is_acted_with(head: ActionHead, stop_token: bool) -> None:
    config = dataclasses.replace(TINY, action_head=head, num_actions_chunk=2, stop_token=stop_token)
    vla, processor = random_vla(config, seed=1).eval(), drawn_processor(config, "demo", {"demo": ENTRY})
    frames, texts = [np.zeros((128, 128, 3), np.uint8)] * 2, ("go", "go there")
    batch = processor.collate([processor.example(frames, text, np.zeros((2, 7), np.float32)) for text in texts])
    assert bool((batch.input_ids == config.eos_token_id).any()) == stop_token
    with torch.no_grad():
        learnt = vla(batch.input_ids, batch.attention_mask, batch.pixel_values, batch.labels, actions=batch.actions)
    actions = learnt.actions
    if head == "parallel":  # the likeliest of the action tokens, as when acting
        first = vla.tokenizer.first_id
        actions = vla.chunks(bin_centers(first + learnt.logits[:, first : config.vocab_size].argmax(-1), vla.tokenizer))
    for row, text in enumerate(texts):
        acted = vla.predict_chunk(torch.tensor([processor.prompt_ids(text)]), batch.pixel_values[row : row + 1])[0]
        torch.testing.assert_close(actions[row], acted, atol=1e-5, rtol=0)


def test_each_camera_has_augmentation_parameters_of_its_own(tiny: Processor) -> None:
    frame = np.random.default_rng(0).integers(0, 255, (128, 128, 3)).astype(np.uint8)
    rng = np.random.default_rng(1)
    both = [Augmentation.draw(rng), Augmentation.draw(rng)]
    pixels = tiny.example([frame, frame], "go", np.zeros(7, np.float32), augmentations=both).pixel_values
    first, second = images_of(pixels, tiny)
    np.testing.assert_array_equal(first, both[0](frame))
    np.testing.assert_array_equal(second, both[1](frame))


# The files that a Processor comes out of, of anybody: one that makes sense, or one sentence


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(COMMITTED, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "checkpoint"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_processor(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"center_crop": None}, {"center_crop": 1}, {"center_crop": "true"}, {"means": [[0.5, 0.5, 0.5]]}, {"means": [[0.5] * 3, [0.5] * 2]},
        {"means": None}, {"stds": [[0.5] * 3, [0.0] * 3]}, {"stds": [[0.5] * 3, [-0.5] * 3]}, {"stds": "abc"}, {"image_size": 0},
        {"image_size": "224"}, {"vocab_size": -1}, {"vocab_size": 3.5}, {"unnorm_key": 3}, {"unnorm_key": "no such key"}, {"format": 2},
        {"num_images_in_input": None}, {"action_head": "other"}, {"a_field_of_a_later_version": 1}, {"empty_token_id": None},
        {"means": [[124.0] * 3] * 2}, {"stds": [[58.0] * 3] * 2}, {"num_actions_chunk": 5000},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_of_processor_json_without_sense_is_named(folder: Path, change: dict[str, Any]) -> None:
    edit(folder / PROCESSOR, **change)
    assert next(iter(change)) in refused(folder) or "unnorm_key" in change


@pytest.mark.parametrize(
    "towers",
    [None, [], [{}], [{"mean": [0.5] * 3, "std": [0.5] * 3}], [{"mean": [0.5] * 3, "std": [0.0] * 3}] * 2, [{"mean": "a", "std": 1}] * 2,
     [{"mean": [124] * 3, "std": [0.5] * 3}] * 2],
    ids=str,
)  # fmt: skip
def test_constants_of_the_towers_make_sense(folder: Path, towers: Any) -> None:
    (folder / PROCESSOR).unlink()
    edit(folder / PREPROCESSOR, tvf_normalize_params=towers)
    assert PREPROCESSOR in refused(folder)


@pytest.mark.parametrize("name", [PROCESSOR, STATISTICS])
def test_a_link_that_leads_nowhere_is_no_missing_file(folder: Path, name: str) -> None:
    """As a hub's snapshot that was copied without its blobs: others would be read in its place, without a word."""
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent / "not there")
    assert name in refused(folder)


def test_another_models_tokenizer_is_refused(folder: Path) -> None:
    config, tokenizer = read_processor(folder / PROCESSOR), load_tokenizer(folder)
    edit(folder / TOKENIZER, post_processor=None)
    assert "BOS" in refused(folder)
    for change in ({"vocab_size": 300, "pad_token_id": 300}, {"empty_token_id": 5}):
        with pytest.raises(ConfigError, match="another model's tokenizer"):
            check_tokenizer(tokenizer, dataclasses.replace(config, **change), folder / TOKENIZER)


@pytest.mark.parametrize(("field", "value"), [("image_size", 196), ("n_action_bins", 128), ("eos_token_id", 5)])
def test_a_processor_of_another_model_is_refused(folder: Path, field: str, value: int) -> None:
    edit(folder / PROCESSOR, **{field: value})
    assert f"processor.json: {field} is {value}, but" in refused(folder)


def test_a_flipped_letter_of_a_sealed_folder_is_found(folder: Path) -> None:
    write_sums(folder, list(folder.iterdir()))
    path = folder / STATISTICS
    path.write_text(path.read_text().replace("1", "2", 1))
    assert "is not as it was written" in refused(folder)


def test_a_link_out_of_a_folder_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of another person")
    folder, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("a tokenizer")
    (folder / "tokenizer.json").symlink_to("../../blobs/1")
    (folder / "tokenizer.model").symlink_to(tmp_path / "secret")
    assert is_its_own(folder / "tokenizer.json") and not is_its_own(folder / "tokenizer.model")
    assert not is_its_own(folder / "none")
