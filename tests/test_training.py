"""The parts of a training run that need no run: a step's numbers and learning rate, the optimizers, the state beside the weights."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from action_tokenizer import ActionTokenizer
from prismatic.models.vla import IGNORE, VLAOutput
from prismatic.processor import Batch
from prismatic.training.distributed import SINGLE_PROCESS
from prismatic.training.metrics import ActionErrors, action_errors
from prismatic.training.optimizer import make_optimizer
from prismatic.training.state import Progress, capture, restore, seed_torch
from prismatic.training.step import learning_rate

END = 2


def errors_of(actions: np.ndarray, off: np.ndarray) -> ActionErrors:
    """Of a model whose tokens are `off` by so many bins; rows begin with prompts of different length."""
    tokenizer, rows = ActionTokenizer(vocab_size=1000, n_bins=256), len(actions)
    true = tokenizer.encode(actions).reshape(rows, -1)
    padded = [[IGNORE] * (2 - row) + [*ids, END] + [IGNORE] * row for row, ids in enumerate(true)]
    predicted = np.concatenate([[*(ids + shift), END] for ids, shift in zip(true, off, strict=True)])
    labels, logits = torch.tensor(padded), torch.nn.functional.one_hot(torch.from_numpy(predicted), 1000).float()
    batch = Batch(labels, labels, labels != IGNORE, torch.zeros(rows, 6, 1, 1), torch.tensor(actions))
    return action_errors(VLAOutput(logits, None), batch, tokenizer)


def test_tokens_are_compared_number_by_number_of_a_chunk() -> None:
    off = np.array([[0, 10, 0, 0], [0, 0, -20, 0]])
    errors = errors_of(np.array([[[0.0, 0.5], [-0.5, 0.9]], [[-0.9, 0.1], [0.3, -0.3]]]), off)  # (B, K, D)
    assert errors.correct is not None and (errors.correct == (off.reshape(2, 2, 2) == 0)).all()
    np.testing.assert_allclose(errors.distance, abs(off.reshape(2, 2, 2)) * 2 / 255, atol=1e-9)
    accuracies = dict.fromkeys(("action_accuracy", "curr_action_accuracy", "next_actions_accuracy"), 0.75)
    distances = {"l1_loss": 30 / 8, "curr_action_l1_loss": 10 / 4, "next_actions_l1_loss": 20 / 4}  # bins
    expected = accuracies | {name: bins * 2 / 255 for name, bins in distances.items()}
    assert errors.numbers() == pytest.approx(expected)
    # one action has no others
    assert errors_of(np.zeros((1, 1, 3)), np.zeros((1, 3), int)).numbers() == {"l1_loss": 0.0, "action_accuracy": 1.0}


def test_the_learning_rate_rises_falls_and_decays() -> None:
    how = {"peak": 1.0, "warmup_steps": 10, "max_steps": 110}
    assert learning_rate(0, schedule="constant", **how) == pytest.approx(0.1)
    assert learning_rate(9, schedule="cosine", **how) == learning_rate(500, schedule="constant", **how) == 1.0
    assert learning_rate(60, schedule="cosine", **how) == pytest.approx(0.5)
    assert learning_rate(110, schedule="cosine", **how) == pytest.approx(0.0)
    assert learning_rate(60, schedule="cosine", decay_step=60, **how) == pytest.approx(0.05)


def test_one_decay_is_openvla_oft_s_and_acts_with_a_warm_up_too(oft_numbers: Path) -> None:
    """The original makes a step more than it was asked for, and with a warm-up its decay never acts: neither here."""
    runs = json.loads((oft_numbers / "finetune_run.json").read_text())
    plain, warm = runs["plain"], runs["warmup"]
    for run, asked in ((plain, 0), (warm, warm["config"]["lr_warmup_steps"])):
        decay, rates = run["config"]["num_steps_before_decay"], run["lr_of_each_optimizer_step"]
        how = {"peak": run["config"]["learning_rate"], "schedule": "constant", "max_steps": run["config"]["max_steps"]}
        ours = [
            learning_rate(step, warmup_steps=asked, warmup_start=0.1, decay_step=decay, **how)
            for step in range(run["config"]["max_steps"])
        ]
        assert ours[:decay] == pytest.approx(rates[:decay])
        assert ours[decay:] == pytest.approx([how["peak"] / 10] * len(ours[decay:]))
    first_after, peak = plain["config"]["num_steps_before_decay"], plain["config"]["learning_rate"]
    assert plain["lr_of_each_optimizer_step"][first_after] == pytest.approx(peak / 10)


def test_eight_bit_moments_go_where_the_exact_ones_go_take_a_quarter_and_can_be_put_back() -> None:
    start, held = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)), []
    weights = [torch.nn.Parameter(start.clone()) for _ in range(3)]
    names = ("adamw", "paged_adamw_8bit", "paged_adamw_8bit")
    optimizers = [
        make_optimizer(n, [w], learning_rate=1e-2, weight_decay=0.01) for n, w in zip(names, weights, strict=True)
    ]

    def step(number: int) -> None:
        optimizers[number].zero_grad()
        (weights[number].square().sum() + weights[number].sum()).backward()
        optimizers[number].step()

    for number in (0, 1):
        for _ in range(20):
            step(number)
        state = optimizers[number].state[weights[number]]
        held.append(sum(t.nbytes for k, t in state.items() if torch.is_tensor(t) and not k.startswith("qmap")))
    exact, eight, other = weights
    moved = (exact - start).norm()
    assert moved > 5 and (eight - exact).norm() < 0.05 * moved and held[1] < 0.27 * held[0]
    other.data = eight.data.clone()
    optimizers[2].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    step(1)
    step(2)
    assert torch.equal(eight, other)


def test_the_state_goes_through_a_file(tmp_path: Path) -> None:
    def stepped(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> torch.Tensor:
        weight.grad = torch.arange(3.0)
        optimizer.step()
        return weight.detach().clone()

    seed_torch(7)
    weight = torch.nn.Parameter(torch.rand(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    stepped(optimizer, weight)
    progress = Progress(effective_batch=12, step=5, bad_steps=2, learning_rate=0.1)
    torch.save(capture(progress, optimizer, SINGLE_PROCESS), tmp_path / "state.pt")
    again = torch.nn.Parameter(weight.detach().clone())
    drawn, moved = torch.rand(2), stepped(optimizer, weight)
    seed_torch(8)
    other = torch.optim.AdamW([again], lr=0.1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["draws"] == 60 and state["versions"]["torch"]
    assert restore(state, other, SINGLE_PROCESS, seed=7) == progress
    assert torch.equal(torch.rand(2), drawn) and torch.equal(stepped(other, again), moved)


def test_ranks_and_steps_have_numbers_of_their_own() -> None:
    drawn = []
    for rank, step in ((0, 0), (1, 0), (2, 0), (1, 5)):
        seed_torch(7, rank=rank, step=step)
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 4
