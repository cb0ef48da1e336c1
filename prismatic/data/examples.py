"""Draws of a mixture → training samples, through the Processor. What a data loader's worker processes run; no TensorFlow.

Surprising: the augmentation of draw p depends on the seed and p alone, so neither the number of workers nor a resumed run changes a pixel.
"""

import atexit
import os
import signal
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from prismatic.data.frames import DrawBatches, Mixture, Step
from prismatic.image import Augmentation, decode_jpeg
from prismatic.processor import Batch, Example, Processor

AUGMENTATION_STREAM = 1  # keeps the augmentation's random numbers apart from the shuffling's, which share the seed


def example(
    step: Step, processor: Processor, augmentation: Augmentation | None = None, *, as_acting: bool = False
) -> Example:
    """One recorded step as the model sees it; as_acting: as it would see it when it acts."""
    pictures = [decode_jpeg(step.image)]
    if processor.config.num_images_in_input == 2 and step.wrist is not None:
        pictures.append(decode_jpeg(step.wrist))
    return processor.example(
        pictures,
        step.instruction,
        step.actions[0],
        dataset=step.dataset,
        augmentations=[] if augmentation is None else [augmentation] * len(pictures),
        as_acting=as_acting,
    )


class Examples(Dataset[Example]):
    """`examples[p]`: the sample of draw p. augmentations: names from image.AUGMENTATIONS, none for pictures as they are."""

    def __init__(self, mixture: Mixture, processor: Processor, *, augmentations: Sequence[str], seed: int) -> None:
        self.mixture, self.processor, self.augmentations, self.seed = mixture, processor, tuple(augmentations), seed

    def __getitem__(self, draw: int) -> Example:
        rng = np.random.default_rng((self.seed, AUGMENTATION_STREAM, draw))
        augmentation = Augmentation.draw(rng, self.augmentations) if self.augmentations else None
        return example(self.mixture[draw], self.processor, augmentation)


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # an ordinary end aborts now and then: the thread that sends batches may still be in C++
    atexit.register(os._exit, 0)
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the parent saves and then ends us
        signal.signal(number, signal.SIG_IGN)


def batches(examples: Examples, draws: DrawBatches, *, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Endless batches from the step at which draws begins; the workers read ahead."""
    loader = DataLoader(
        examples,
        batch_sampler=draws,  # pyright: ignore[reportArgumentType]  (any iterable of index lists serves)
        collate_fn=examples.processor.collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # its own: it would draw from the model's random numbers, and a resumed run would part from a whole one
        multiprocessing_context="spawn" if num_workers else None,  # forkserver's workers outlive a killed trainer
        prefetch_factor=2 if num_workers else None,
    )
    return iter(loader)
