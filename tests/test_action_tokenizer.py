"""Action tokens against the original's arrays: every bin, its edges to the last bit, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from action_tokenizer import ActionTokenizer


@pytest.mark.parametrize("width", ["64", "32"])
def test_ids_and_centres_are_the_originals(numbers: Path, width: str) -> None:
    arrays = np.load(numbers / "action_tokenizer.npz")
    values, ids = arrays[f"value{width}"], arrays[f"token_id_from_float{width}"]
    defined = ~np.isnan(values)
    tokenizer = ActionTokenizer()
    np.testing.assert_array_equal(tokenizer.encode(values[defined]), ids[defined])
    np.testing.assert_array_equal(tokenizer.decode(ids), arrays[f"decoded_from_float{width}"])


def test_all_ids_decode_as_in_the_original(numbers: Path) -> None:
    arrays = np.load(numbers / "action_tokenizer.npz")
    np.testing.assert_array_equal(ActionTokenizer().decode(arrays["all_ids"]), arrays["decoded_of_all_ids"])


def test_ends_and_middle() -> None:
    ids = ActionTokenizer().encode(np.array([-np.inf, -1.0, 0.0, 1.0, np.inf]))
    np.testing.assert_array_equal(ids, [31999, 31999, 31872, 31744, 31744])
    assert ids.dtype == np.int64


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        ActionTokenizer().encode(np.array([0.0, np.nan]))


@pytest.mark.parametrize(("vocab_size", "n_bins"), [(32000, 256), (1024, 256), (500, 16)])
def test_every_id_but_the_first_survives_the_round_trip(vocab_size: int, n_bins: int) -> None:
    tokenizer = ActionTokenizer(vocab_size, n_bins)
    ids = np.arange(tokenizer.first_id + 1, vocab_size)
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(ids)), ids)
    assert tokenizer.decode(tokenizer.first_id) == tokenizer.decode(tokenizer.first_id + 1)


def test_shape_is_kept() -> None:
    actions = np.zeros((2, 3, 7))
    assert ActionTokenizer().decode(ActionTokenizer().encode(actions)).shape == actions.shape
