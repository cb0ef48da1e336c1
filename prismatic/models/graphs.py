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


def is_memory(error: BaseException) -> bool:
    """Whether a GPU's memory didn't suffice: libraries that torch calls say it in words of their own."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "ALLOC_FAILED")
    )


def first_reason(error: BaseException, handled: BaseException | None) -> BaseException:
    """Where it began: a recording that breaks off raises again as it ends, and hides why. Missing memory, if that is among the reasons.

    handled: what the caller was handling before (sys.exception()), which is none of them.
    """
    chain = [error]
    while (before := chain[-1].__context__) is not None and before is not handled:
        chain.append(before)
    return next(filter(is_memory, chain), chain[-1])


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
        try:
            # "thread_local": what other threads do meanwhile, such as a loader's that pins memory, is none of its business
            with (
                torch.cuda.stream(torch.cuda.current_stream()),  # is the current one again, however it ends
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                answer = work()
        except BaseException:
            self._drop_pool()
            raise

        def play() -> T:
            graph.replay()
            return answer

        return play

    def _drop_pool(self) -> None:
        """After a recording that broke off the next ones get another; torch 2.11 would hold the old one's memory for ever."""
        broken, self.pool = self.pool, torch.cuda.graph_pool_handle()
        with contextlib.suppress(RuntimeError, AttributeError):  # later versions have done it themselves
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), broken)  # pyright: ignore[reportAttributeAccessIssue]
            torch._C._cuda_releasePool(torch.cuda.current_device(), broken)  # pyright: ignore[reportAttributeAccessIssue]
