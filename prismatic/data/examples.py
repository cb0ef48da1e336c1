"""Draws of a mixture → training samples, through the Processor. What a data loader's worker processes run; no TensorFlow.

Surprising: the augmentation of draw p depends on the seed and p alone, so neither the number of workers nor a resumed run changes a pixel.
"""

import atexit
import itertools
import os
import signal
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from prismatic.data.frames import Mixture, Step
from prismatic.errors import ConfigError
from prismatic.image import Augmentation, decode_jpeg
from prismatic.processor import Batch, Example, Processor

AUGMENTATION_STREAM = 1  # keeps the augmentation's random numbers apart from the shuffling's, which share the seed
PREFETCHED = 2  # batches that each worker has ready
SLOWEST_BATCH = 600  # seconds


def example(
    step: Step, processor: Processor, augmentations: Sequence[Augmentation] = (), *, as_acting: bool = False
) -> Example:
    """One recorded step as the model sees it; augmentations: one an image; as_acting: as it would see it when it acts."""
    jpegs = (step.image, step.wrist)[: processor.config.num_images_in_input]
    images = [decode_jpeg(jpeg) for jpeg in jpegs if jpeg is not None]
    return processor.example(
        images, step.instruction, step.actions, state=step.state, dataset=step.dataset, augmentations=augmentations, as_acting=as_acting,
    )  # fmt: skip


class Examples(Dataset[Example]):
    """`examples[p]`: the sample of draw p. augmentations: names from image.AUGMENTATIONS, none for images as they are."""

    def __init__(self, mixture: Mixture, processor: Processor, *, augmentations: Sequence[str], seed: int) -> None:
        self.mixture, self.processor, self.augmentations, self.seed = mixture, processor, tuple(augmentations), seed

    def __getitem__(self, draw: int) -> Example:
        return example(self.mixture[draw], self.processor, self._augmentations(draw))

    def _augmentations(self, draw: int) -> list[Augmentation]:
        """One an image: drawn for each as in OpenVLA-OFT; a token head's second image, which OpenVLA hasn't, has those of the first."""
        if not self.augmentations:
            return []
        images, rng = (
            self.processor.config.num_images_in_input,
            np.random.default_rng((self.seed, AUGMENTATION_STREAM, draw)),
        )
        if self.processor.config.action_head == "tokens":
            return [Augmentation.draw(rng, self.augmentations)] * images
        return [Augmentation.draw(rng, self.augmentations) for _ in range(images)]


class DrawBatches:
    """Batch sampler of torch's DataLoader over a Mixture: endless batches, each a list of draw numbers.

    Batch k of all W ranks together is draws [k·B·W, (k+1)·B·W), shared out without repeats; to resume is to begin at a later one.
    """

    def __init__(self, *, batch_size: int, first: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.batch_size, self.first = batch_size, first  # samples of one rank; number of the first batch
        self.rank, self.world_size = rank, world_size

    def batch(self, number: int) -> list[int]:
        """This rank's draws of a batch (≥ 0)."""
        start = (number * self.world_size + self.rank) * self.batch_size
        return list(range(start, start + self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.batch, itertools.count(self.first))


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # an ordinary end aborts now and then: the thread that sends batches may still be in C++
    atexit.register(os._exit, 0)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGUSR1,
    ):  # they may reach the whole group; the parent ends us
        signal.signal(number, signal.SIG_IGN)


def batches(examples: Examples, draws: DrawBatches, *, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Endless batches from the one at which draws begins; the workers read ahead. ConfigError where a worker is lost or none comes for long."""
    loader = DataLoader(
        examples,
        batch_sampler=draws,  # pyright: ignore[reportArgumentType]  (any iterable of index lists serves)
        collate_fn=examples.processor.collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        timeout=SLOWEST_BATCH if num_workers else 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # its own: it would draw from the model's random numbers, and a resumed run would part from a whole one
        multiprocessing_context="spawn" if num_workers else None,  # forkserver's workers outlive a killed trainer
        prefetch_factor=PREFETCHED if num_workers else None,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise ConfigError(
            f"the data loader gave no batch ({str(error).splitlines()[0]}): look for a full disk, memory or /dev/shm, or give --num_workers 0"
        ) from error
