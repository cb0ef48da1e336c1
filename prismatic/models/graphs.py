"""CUDA graphs: what a function starts on a GPU, recorded once and replayed with one call. In: a function. Out: what replays it.

All graphs of a Recorder share one pool of memory: they are never replayed at the same time, and what one answers stays where it is for as long
as that answer's tensors are held.
"""

import contextlib
import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """While it lasts this GPU is the current one: streams and graphs are made on the current one, wherever tensors are. A CPU needs nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def give_back() -> None:
    """What nobody holds any more, to the GPU."""
    gc.collect()  # compiled layers, and what a failed recording held, go in circles
    if torch.cuda.is_available():
        # torch 2.11 refuses after a recording that broke off
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def first_reason(error: BaseException) -> BaseException:
    """Where it began: a recording that breaks off raises again as it ends, and hides why."""
    while error.__context__ is not None:
        error = error.__context__
    return error


class Recorder:
    """Where functions are recorded, on the current GPU, and run before that: autograd may remember the stream on which it met a parameter."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], T]) -> T:
        """Its answer, now."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            answer = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return answer

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """What replays it and returns the same tensors each time, filled anew. work must have run before: libraries and kernels are set up then."""
        graph = torch.cuda.CUDAGraph()
        # what other threads do meanwhile, such as a loader's that pins memory, is none of its business
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            answer = work()

        def play() -> T:
            graph.replay()
            return answer

        return play
