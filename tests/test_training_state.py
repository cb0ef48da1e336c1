"""The state beside the weights: random numbers of four libraries, optimizer, and the place in the data."""

import random
from pathlib import Path

import numpy as np
import torch

from prismatic.training.distributed import SINGLE_PROCESS
from prismatic.training.state import Progress, capture, restore, seed_everything


def some_numbers() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(1).item(), random.gauss(0, 1)]


def stepped(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> torch.Tensor:
    weight.grad = torch.arange(3.0)
    optimizer.step()
    return weight.detach().clone()


def test_all_of_it_goes_through_a_file(tmp_path: Path) -> None:
    seed_everything(7)
    some_numbers()
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    stepped(optimizer, weight)
    progress = Progress(effective_batch=12, step=5, bad_steps=2, learning_rate=0.1)
    torch.save(capture(progress, optimizer, SINGLE_PROCESS), tmp_path / "state.pt")
    again = torch.nn.Parameter(weight.detach().clone())
    expected, moved = some_numbers(), stepped(optimizer, weight)
    seed_everything(8)
    other = torch.optim.AdamW([again], lr=0.1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["draws"] == 60 and state["versions"]["torch"]
    assert restore(state, other, SINGLE_PROCESS, seed=7) == progress
    assert some_numbers() == expected
    assert torch.equal(stepped(other, again), moved)


def test_ranks_have_numbers_of_their_own() -> None:
    drawn = []
    for rank, step in ((0, 0), (1, 0), (2, 0), (1, 5)):
        seed_everything(7, rank=rank, step=step)
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 4
    torch.manual_seed(7)
    assert torch.rand(1).item() == drawn[0]
