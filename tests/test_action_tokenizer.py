"""Action tokens against the original's arrays (closeness.py): every bin, its edges to the last bit; and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from action_tokenizer import ActionTokenizer
from tests import closeness


def test_ids_and_centres_are_the_originals(numbers: Path) -> None:
    closeness.check(closeness.numbers(numbers))


def test_ends_and_middle_shape_and_nan() -> None:
    tokenizer = ActionTokenizer()
    ids = tokenizer.encode(np.array([-np.inf, -1.0, 0.0, 1.0, np.inf]))
    np.testing.assert_array_equal(ids, [31999, 31999, 31872, 31744, 31744])
    assert ids.dtype == np.int64 and tokenizer.decode(tokenizer.encode(np.zeros((2, 3, 7)))).shape == (2, 3, 7)
    with pytest.raises(ValueError, match="NaN"):
        tokenizer.encode(np.array([0.0, np.nan]))


@pytest.mark.parametrize(("vocab_size", "n_bins"), [(32000, 256), (1024, 256), (500, 16)])
def test_every_id_but_the_first_survives_the_round_trip(vocab_size: int, n_bins: int) -> None:
    tokenizer = ActionTokenizer(vocab_size, n_bins)
    ids = np.arange(tokenizer.first_id + 1, vocab_size)
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(ids)), ids)
    assert tokenizer.decode(tokenizer.first_id) == tokenizer.decode(tokenizer.first_id + 1)
