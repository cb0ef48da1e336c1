"""Robot actions as tokens: each number becomes one of the last 256 ids of the language model's vocabulary.

In: actions in [-1, 1] (normalised by prismatic/normalize.py). Out: token ids, and back to bin centres. Surprising: 256 edges make only
255 bins, so the two lowest ids decode to the same centre (+0.996), and the largest value has the smallest id.
"""

import numpy as np


class ActionTokenizer:
    """Maps actions to token ids `vocab_size - 256 … vocab_size - 1` and back (OpenVLA's uniform bins over [-1, 1])."""

    def __init__(self, vocab_size: int = 32000, n_bins: int = 256) -> None:
        """vocab_size: the tokenizer's tokens without padding rows. n_bins: number of bin edges, equal to the number of ids."""
        if not 2 <= n_bins < vocab_size:
            raise ValueError(f"n_bins={n_bins} must lie between 2 and vocab_size={vocab_size}")
        self.vocab_size = vocab_size
        self.n_bins = n_bins
        self.edges = np.linspace(-1.0, 1.0, n_bins)
        self.centers = (self.edges[:-1] + self.edges[1:]) / 2.0

    @property
    def first_id(self) -> int:
        """The smallest action id (31744 for Llama-2): what +1 becomes."""
        return self.vocab_size - self.n_bins

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """(..., D) floats → (..., D) int64 ids. Clipped to [-1, 1], ±inf too; NaN raises ValueError.

        `id = vocab_size - digitize(clip(a, -1, 1), edges)`, compared in float64 also for float32 input.
        """
        values = np.asarray(actions, dtype=np.float64)
        if np.isnan(values).any():
            raise ValueError("an action is NaN: it has no token")
        return self.vocab_size - np.digitize(np.clip(values, -1.0, 1.0), self.edges).astype(np.int64)

    def decode(self, ids: np.ndarray | int) -> np.ndarray:
        """(..., D) ids → (..., D) float64 bin centres in [-0.996, 0.996]; ids outside the action range take the nearest end."""
        bins = self.vocab_size - np.asarray(ids, dtype=np.int64) - 1
        return self.centers[np.clip(bins, 0, len(self.centers) - 1)]
