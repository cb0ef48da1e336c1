"""The loader: a batch that doesn't come ends the run in a sentence, and doesn't wait for ever."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from prismatic.data import loader
from prismatic.errors import ConfigError


class Stuck:
    """Examples whose every sample takes an hour."""

    class processor:
        collate = staticmethod(list)

    def __getitem__(self, index: int) -> Any:
        time.sleep(3600)


class Draws:
    def __iter__(self) -> Iterator[list[int]]:
        yield [0]


def test_a_batch_that_never_comes_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SLOWEST_BATCH", 1)
    stream = loader.batches(Stuck(), Draws(), num_workers=1, pin_memory=False)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"gave no batch.*--num_workers 0"):
        next(stream)
