"""Counts the bytes of the tensors that are alive while code runs: what a GPU would have to hold, counted on any machine.

In: code under `with LiveBytes() as live:`. Out: live.now and live.peak. On fake tensors (FakeTensorMode) nothing is computed and nothing is
allocated, so a forward and backward pass of the full size takes seconds. Only tensors made inside are counted; what a kernel takes for itself
and gives back is not seen.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside: `now`, and the most at a time, `peak`. A view counts nothing, a storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._know(tensor.untyped_storage(), 0)  # was there before
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._know(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return out

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
