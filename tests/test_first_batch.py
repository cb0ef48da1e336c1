"""The picture of the first batch: its pixels are the model's, its words those that are learnt."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prismatic.augmentation import Augmentation
from prismatic.models.tiny import TINY, tiny_tokenizer
from prismatic.processor import Batch, Processor, ProcessorConfig
from prismatic.training import first_batch

ENTRY = {"action": {"q01": [-2.0] * 7, "q99": [2.0] * 7, "min": [-2.0] * 7, "max": [2.0] * 7, "mask": [True] * 7}}
SAID = "Put the <red> bowl in?\nOut: the drawer"


@pytest.fixture
def processor() -> Processor:
    config = ProcessorConfig.for_model(TINY, unnorm_key="demo", center_crop=True)
    return Processor(config, tiny_tokenizer(["put the red bowl on the plate"]), {"demo": ENTRY})


def batch_of(processor: Processor, samples: int) -> tuple[Batch, list[list[np.ndarray]]]:
    """Noise, augmented; the pictures as the model sees them are computed here a second time."""
    rng = np.random.default_rng(0)
    examples, seen = [], []
    for number in range(samples):
        frames = [rng.integers(0, 255, (128, 128, 3)).astype(np.uint8) for _ in range(2)]
        augmentation = Augmentation.draw(rng)
        action = np.linspace(-1.9, 1.9, 7) * (1 if number else -1)
        said = SAID if number else "go"
        examples.append(processor.example(frames, said, action, augmentations=[augmentation] * len(frames)))
        seen.append([augmentation(frame) for frame in frames])
    return processor.collate(examples), seen


def test_the_sheet_shows_every_sample_of_a_step(processor: Processor, tmp_path: Path) -> None:
    (one, first), (two, second) = batch_of(processor, 3), batch_of(processor, 3)
    first_batch.draw([one, two], processor, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    side = 2 * 128  # enlarged twice
    height = (sheet.shape[0] - first_batch.GAP) // 2  # of a row of samples: pictures and the words below them
    width = 2 * side + first_batch.GAP
    for number, pictures in enumerate([*first, *second]):
        row, column = divmod(number, first_batch.COLUMNS)
        top, left = first_batch.GAP + row * height, first_batch.GAP + column * width
        shown = sheet[top : top + side : 2, left : left + 2 * side : 2]
        np.testing.assert_array_equal(shown, np.concatenate(pictures, axis=1), err_msg=f"sample {number}")
        below = sheet[top + side : top + height, left : left + 2 * side]
        assert (below < 128).any(), "no words"
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_the_words_are_those_that_are_learnt(processor: Processor) -> None:
    batch, _ = batch_of(processor, 2)
    text = " ".join(first_batch._words(batch, 1, processor, width=1000))
    assert SAID.lower().replace("\n", " ") in text
    assert "x -1.8" in text and "roll +0.0" in text and "gripper +1.8" in text
    several = Processor(ProcessorConfig.for_model(TINY, unnorm_key=None, center_crop=True), processor.tokenizer, {})
    assert "normalised: x -0.9" in " ".join(first_batch._words(batch, 1, several, width=1000))
