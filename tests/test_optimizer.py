"""The optimizers that --optimizer names."""

import copy

import pytest
import torch

from prismatic.errors import ConfigError
from prismatic.training.optimizer import make_optimizer


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(128, 64, generator=torch.Generator().manual_seed(0)))


def steps(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, number: int) -> None:
    for _ in range(number):
        optimizer.zero_grad()
        (weight.square().sum() + weight.sum()).backward()
        optimizer.step()


def test_eight_bit_moments_go_where_the_exact_ones_go_and_take_a_quarter() -> None:
    weights, held = [], []
    for name in ("adamw", "paged_adamw_8bit"):
        weight = parameter()
        optimizer = make_optimizer(name, [weight], learning_rate=1e-2, weight_decay=0.01)
        steps(optimizer, weight, 20)
        weights.append(weight.detach())
        state = optimizer.state[weight]
        held.append(sum(t.nbytes for k, t in state.items() if torch.is_tensor(t) and not k.startswith("qmap")))
    exact, eight = weights
    moved = (exact - parameter().detach()).norm()
    assert moved > 5 and (eight - exact).norm() < 0.05 * moved
    assert held[1] < 0.27 * held[0]


def test_its_state_can_be_put_back(tmp_path) -> None:
    one, other = parameter(), parameter()
    optimizer = make_optimizer("paged_adamw_8bit", [one], learning_rate=1e-2, weight_decay=0.01)
    steps(optimizer, one, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other.data = copy.deepcopy(one.data)
    resumed = make_optimizer("paged_adamw_8bit", [other], learning_rate=1e-2, weight_decay=0.01)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(optimizer, one, 3)
    steps(resumed, other, 3)
    assert torch.equal(one, other)


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="--optimizer sgd"):
        make_optimizer("sgd", [parameter()], learning_rate=1e-2, weight_decay=0.0)
