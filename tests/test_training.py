"""The arithmetic of a step: which action was right, how far off the others were, and the learning rate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from action_tokenizer import ActionTokenizer
from prismatic.models.vla import IGNORE, VLAOutput
from prismatic.processor import Batch
from prismatic.training.metrics import action_errors, measure
from prismatic.training.step import learning_rate

END = 2


def batch_of(actions: torch.Tensor, labels: torch.Tensor) -> Batch:
    return Batch(labels, labels, labels != IGNORE, torch.zeros(len(labels), 6, 1, 1), actions)


def test_tokens_are_compared_number_by_number_of_a_chunk() -> None:
    tokenizer = ActionTokenizer(vocab_size=1000, n_bins=256)
    actions = np.array([[[0.0, 0.5], [-0.5, 0.9]], [[-0.9, 0.1], [0.3, -0.3]]])  # (B, K, D)
    true = tokenizer.encode(actions).reshape(2, 4)
    labels = torch.tensor([[IGNORE, IGNORE, *true[0], END], [IGNORE, *true[1], END, IGNORE]])
    off = np.array([[0, 10, 0, 0], [0, 0, -20, 0]])
    predicted = np.concatenate([[*(row + shift), END] for row, shift in zip(true, off, strict=True)])
    logits = torch.nn.functional.one_hot(torch.from_numpy(predicted), 1000).float()
    errors = action_errors(VLAOutput(logits, None), batch_of(torch.tensor(actions), labels), tokenizer)
    assert errors.correct is not None and (errors.correct == (off.reshape(2, 2, 2) == 0)).all()
    np.testing.assert_allclose(errors.distance, abs(off.reshape(2, 2, 2)) * 2 / 255, atol=1e-9)
    metrics = measure(1.0, errors)
    assert (metrics.action_accuracy, metrics.curr_action_accuracy, metrics.next_actions_accuracy) == (0.75, 0.75, 0.75)
    assert metrics.l1_loss == pytest.approx(60 / 255 / 8)
    assert metrics.curr_action_l1_loss == pytest.approx(20 / 255 / 4)
    assert metrics.next_actions_l1_loss == pytest.approx(40 / 255 / 4)


def test_one_action_has_no_others() -> None:
    tokenizer = ActionTokenizer(vocab_size=1000, n_bins=256)
    labels = torch.tensor([[IGNORE, *tokenizer.encode(np.zeros(3)), END]])
    logits = torch.nn.functional.one_hot(labels[0, 1:], 1000).float()
    errors = action_errors(VLAOutput(logits, None), batch_of(torch.zeros(1, 1, 3), labels), tokenizer)
    assert measure(1.0, errors).row() == {"loss": 1.0, "l1_loss": 0.0, "action_accuracy": 1.0, "grad_norm": 0.0}


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
