"""What a checkpoint holds beside the weights, and how it is put back: optimizer, place in the schedule and in the data, random numbers.

There is no gradient scaler to save: bfloat16 has float32's range. The learning rate is a function of the step and of the run's options.
Surprising: the file is the same however many processes wrote it, sharded or not, so any other number of them can go on from it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from prismatic.errors import ConfigError
from prismatic.training.distributed import Ranks
from prismatic.versions import versions


@dataclass
class Progress:
    """Where a run stands."""

    effective_batch: int  # samples of a step, over all micro-batches and ranks; a run keeps it
    step: int = 0  # steps done
    bad_steps: int = 0  # skipped in a row till now
    learning_rate: float = 0.0  # of the last step

    @property
    def draws(self) -> int:
        """The sampler's position: samples drawn from the mixture."""
        return self.step * self.effective_batch

    def micro_batches(self, ranks: Ranks, batch_size: int) -> tuple[int, int]:
        """(micro_batch_size, grad_accumulation_steps) of each rank: micro-batches as large as divide its share, at most batch_size.

        ConfigError where the ranks can't have equal shares.
        """
        share, rest = divmod(self.effective_batch, ranks.size)
        if rest:
            raise ConfigError(
                f"{ranks.size} processes can't share out the {self.effective_batch} samples of this run's steps: start a number that divides it"
            )
        largest = max(n for n in range(1, min(batch_size, share) + 1) if share % n == 0)
        return largest, share // largest


def seed_torch(seed: int, *, rank: int = 0, step: int = 0) -> None:
    """Seed torch's random numbers, apart from each other for every rank and step. Nothing in training draws from any others."""
    if rank or step:
        seed = int(np.random.SeedSequence((seed, rank, step)).generate_state(1)[0])
    torch.manual_seed(seed)


def capture(progress: Progress, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any]:
    """The state to save, whole on rank 0. All ranks call it."""
    numbers = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        numbers["cuda"] = torch.cuda.get_rng_state()
    return {
        **dataclasses.asdict(progress),
        "draws": progress.draws,
        "optimizer": ranks.whole(optimizer.state_dict()),
        "rng": ranks.gather(numbers),
        "versions": versions(),
    }


def restore(state: dict[str, Any], optimizer: torch.optim.Optimizer, ranks: Ranks, *, seed: int) -> Progress:
    """Put optimizer and random numbers back; returns where the run stands. A rank that there was not gets numbers of its own."""
    optimizer.load_state_dict(_cut_up(state["optimizer"], optimizer))
    if ranks.rank < len(state["rng"]):
        numbers = state["rng"][ranks.rank]
        torch.set_rng_state(numbers["torch"])
        if torch.cuda.is_available() and "cuda" in numbers:
            torch.cuda.set_rng_state(numbers["cuda"])
    else:
        seed_torch(seed, rank=ranks.rank, step=state["step"])
    return Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})


def _cut_up(stored: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Each whole tensor of an optimizer's state as this rank's piece of it, where its parameter is sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in stored["state"].items():
        like = parameters[number]
        if isinstance(like, DTensor):
            for name, value in values.items():
                if value.shape == like.shape:
                    values[name] = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return stored
