"""Which action token was right, and how far off the others were, dimension by dimension."""

import numpy as np
import torch

from action_tokenizer import ActionTokenizer
from prismatic.models.vla import IGNORE
from prismatic.training.step import action_errors, action_metrics


def test_errors_stand_with_their_dimension() -> None:
    tokenizer = ActionTokenizer(vocab_size=1000, n_bins=256)
    true = tokenizer.encode(np.array([[0.0, 0.5, -0.5], [0.9, -0.9, 0.1]]))
    end = 2
    labels = torch.tensor([[IGNORE, IGNORE, *true[0], end], [IGNORE, *true[1][:2], IGNORE, IGNORE, IGNORE]])
    predicted = np.array(
        [true[0][0], true[0][1] + 10, true[0][2], end, true[1][0], true[1][1] - 20]
    )  # the second row was cut
    logits = torch.nn.functional.one_hot(torch.from_numpy(predicted), 1000).float()
    dimension, correct, distance = action_errors(logits, labels, tokenizer)
    assert dimension.tolist() == [0, 1, 2, 0, 1]
    assert correct.tolist() == [True, False, True, True, False]
    np.testing.assert_allclose(distance, [0, 20 / 255, 0, 0, 40 / 255], atol=1e-9)
    np.testing.assert_allclose(action_metrics(logits, labels, tokenizer), [3 / 5, 60 / 255 / 5])
