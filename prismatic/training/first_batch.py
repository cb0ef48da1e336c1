"""The first batch of a run as a picture, to look at before waiting for days: what the model sees, is told, and shall do.

In: the batches of one step, on the CPU. Out: a PNG.
"""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from prismatic.atomic import write_whole
from prismatic.models.vla import IGNORE
from prismatic.normalize import ACTION_DIMENSIONS
from prismatic.processor import PROMPT, Batch, Processor

MOST, COLUMNS = 16, 4  # samples shown, side by side
VIEW, TEXT = 2.4, 1.2  # inches: side of an image, height of the words above it
LINE = 34  # characters of the words above one image


def draw(batches: Sequence[Batch], processor: Processor, path: Path) -> None:
    """Write the first samples, each with its images, its instruction and its decoded actions."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and may ask for a screen

    shown = [(batch, row) for batch in batches for row in range(len(batch.input_ids))][:MOST]
    rows, views = -(-len(shown) // COLUMNS), processor.config.num_images_in_input
    figure = Figure(figsize=(VIEW * views * COLUMNS, (VIEW + TEXT) * rows), layout="constrained")
    for number, (batch, row) in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        axes.set_axis_off()
        axes.imshow(np.concatenate(images_of(batch.pixel_values[row], processor), axis=1), interpolation="nearest")
        text = "\n".join(textwrap.wrap(words(batch, row, processor), LINE * views))
        axes.set_title(text, fontsize=8, parse_math=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    write_whole(path, drawn.getvalue())


def images_of(pixel_values: torch.Tensor, processor: Processor) -> list[np.ndarray]:
    """(6·n_images, S, S) → the (S, S, 3) uint8 images that `Processor.pixel_values` made it of."""
    means, stds = (np.ravel(constants)[:, None, None] for constants in processor.pixel_constants)
    per_image = pixel_values.numpy().reshape(-1, len(means), *pixel_values.shape[-2:])
    unit = (per_image * stds + means)[:, :3]  # the towers see the same image: one of them is enough
    return list(np.rint(unit * 255).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def words(batch: Batch, row: int, processor: Processor) -> str:
    """Instruction, then actions in the data set's units, or normalised where the batch is drawn from several data sets."""
    ids, labels = batch.input_ids[row], batch.labels[row]
    before, after = PROMPT.split("{instruction}")
    prompt = str(processor.tokenizer.decode(ids[(labels == IGNORE) & batch.attention_mask[row]]))
    instruction = prompt.partition(before)[2].rpartition(after)[0]
    assert batch.actions is not None
    action = batch.actions[row, 0].numpy()  # of a chunk the first
    if processor.config.action_head != "l1":  # as its tokens say
        action = processor.action_tokenizer.decode(processor.action_tokenizer.encode(action))
    one = processor.config.unnorm_key is not None
    action = processor.unnormalize(action) if one else action
    names = ACTION_DIMENSIONS if len(action) == len(ACTION_DIMENSIONS) else range(len(action))
    numbers = "  ".join(f"{name} {value:+.3f}" for name, value in zip(names, action, strict=True))
    return f"“{instruction}” {'' if one else 'normalised: '}{numbers}"
