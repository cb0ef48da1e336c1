"""The first batch of a run as a picture, to look at before waiting for days: what the model sees, is told, and shall do.

In: the batches of one step, on the CPU. Out: a PNG; the pictures in it are those of the batches, pixel by pixel.
"""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from prismatic.atomic import write_whole
from prismatic.models.vla import IGNORE
from prismatic.normalize import ACTION_DIMENSIONS
from prismatic.processor import PROMPT, Batch, Processor

MOST = 16  # samples shown
COLUMNS = 4
SMALLEST_SIDE = 224  # pixels; smaller pictures are enlarged by a whole number, so that the words below have room
TEXT_SIZE, LINE, GAP = 12, 16, 12  # pixels
TEXT_LINES = 8  # at most, below a sample: instruction, then actions; enough for one picture of 224 pixels


def draw(batches: Sequence[Batch], processor: Processor, path: Path) -> None:
    """Write the first samples, each with its pictures, its instruction and its decoded actions."""
    shown = [(batch, row) for batch in batches for row in range(len(batch.input_ids))][:MOST]
    samples = len(shown)
    pictures = [images_of(batch.pixel_values[row], processor) for batch, row in shown]
    side = pictures[0][0].shape[0]
    scale = -(-SMALLEST_SIDE // side)
    width = side * scale * len(pictures[0]) + GAP
    said = [_words(*sample, processor, width=(width - GAP) // (TEXT_SIZE // 2 + 1))[:TEXT_LINES] for sample in shown]
    height = side * scale + max(map(len, said)) * LINE + GAP
    rows = -(-samples // COLUMNS)
    sheet = Image.new("RGB", (width * min(samples, COLUMNS) + GAP, height * rows + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), _font()
    for number, views in enumerate(pictures):
        left, top = GAP + width * (number % COLUMNS), GAP + height * (number // COLUMNS)
        enlarged = np.concatenate(views, axis=1).repeat(scale, axis=0).repeat(scale, axis=1)
        sheet.paste(Image.fromarray(enlarged), (left, top))
        pen.multiline_text((left, top + side * scale + 2), "\n".join(said[number]), "black", font, spacing=2)
    drawn = io.BytesIO()
    sheet.save(drawn, format="PNG")
    write_whole(path, drawn.getvalue())


def images_of(pixel_values: torch.Tensor, processor: Processor) -> list[np.ndarray]:
    """(6·n_images, S, S) → the (S, S, 3) uint8 images that `Processor.pixel_values` made it of."""
    means, stds = (np.ravel(constants)[:, None, None] for constants in processor.pixel_constants)
    per_image = pixel_values.numpy().reshape(-1, len(means), *pixel_values.shape[-2:])
    unit = (per_image * stds + means)[:, :3]  # the towers see the same image: one of them is enough
    return list(np.rint(unit * 255).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def instruction_of(input_ids: torch.Tensor, processor: Processor) -> str:
    """The instruction as it stands in the ids (T,) of a prompt or of a training sample."""
    before, after = PROMPT.split("{instruction}")
    text = str(processor.tokenizer.decode(input_ids))
    return text.partition(before)[2].rpartition(after)[0]


def _words(batch: Batch, row: int, processor: Processor, *, width: int) -> list[str]:
    """Instruction, then actions in the data set's units, or normalised where the batch is drawn from several data sets."""
    ids, labels = batch.input_ids[row], batch.labels[row]
    said = instruction_of(ids[(labels == IGNORE) & batch.attention_mask[row]], processor)
    assert batch.actions is not None
    action = batch.actions[row, 0].numpy()  # of a chunk the first
    if processor.config.action_head != "l1":  # as its tokens say
        action = processor.action_tokenizer.decode(processor.action_tokenizer.encode(action))
    one = processor.config.unnorm_key is not None
    action = processor.unnormalize(action) if one else action
    names = ACTION_DIMENSIONS if len(action) == len(ACTION_DIMENSIONS) else range(len(action))
    numbers = "  ".join(f"{name} {value:+.3f}" for name, value in zip(names, action, strict=True))
    return textwrap.wrap(f"“{said}”", width) + textwrap.wrap(numbers if one else f"normalised: {numbers}", width)


def _font() -> ImageFont.FreeTypeFont:
    import matplotlib  # brings a font with more letters than Pillow's own

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), TEXT_SIZE)
