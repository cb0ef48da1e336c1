"""Draws of a mixture → training samples, through the Processor. What a data loader's worker processes run; no TensorFlow.

Surprising: the augmentation of draw p depends on the seed and p alone, so neither the number of workers nor a resumed run changes a pixel.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset

from prismatic.data.frames import Mixture, Step
from prismatic.image import decode_jpeg
from prismatic.processor import Augment, Example, Processor

AUGMENTATION_STREAM = 1  # keeps the augmentation's random numbers apart from the shuffling's, which share the seed
Draw = Callable[[np.random.Generator], Augment]


def example(
    step: Step, processor: Processor, augmentations: Sequence[Augment] = (), *, as_acting: bool = False
) -> Example:
    """One recorded step as the model sees it; augmentations: one an image; as_acting: as it would see it when it acts."""
    jpegs = (step.image, step.wrist)[: processor.config.num_images_in_input]
    images = [decode_jpeg(jpeg) for jpeg in jpegs if jpeg is not None]
    return processor.example(
        images, step.instruction, step.actions, state=step.state, dataset=step.dataset, augmentations=augmentations, as_acting=as_acting,
    )  # fmt: skip


class Examples(Dataset[Example]):
    """`examples[p]`: the sample of draw p. augment: draws one augmentation, such as augmentation.drawing(…); None for images as they are."""

    def __init__(self, mixture: Mixture, processor: Processor, *, augment: Draw | None, seed: int) -> None:
        self.mixture, self.processor, self.augment, self.seed = mixture, processor, augment, seed

    def __getitem__(self, draw: int) -> Example:
        return example(self.mixture[draw], self.processor, self._augmentations(draw))

    def _augmentations(self, draw: int) -> list[Augment]:
        """One an image: drawn for each as in OpenVLA-OFT; a token head's second image, which OpenVLA hasn't, has those of the first."""
        if self.augment is None:
            return []
        config, rng = self.processor.config, np.random.default_rng((self.seed, AUGMENTATION_STREAM, draw))
        if config.action_head == "tokens":
            return [self.augment(rng)] * config.num_images_in_input
        return [self.augment(rng) for _ in range(config.num_images_in_input)]


def draw_batches(*, batch_size: int, first: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[list[int]]:
    """Endless batches of draw numbers of a Mixture, this rank's of batch `first` and on: torch's DataLoader takes them as its batch sampler.

    Batch k of all W ranks together is draws [k·B·W, (k+1)·B·W), shared out without repeats; to resume is to begin at a later one.
    """
    for number in itertools.count(first):
        start = (number * world_size + rank) * batch_size
        yield list(range(start, start + batch_size))
