"""What is said of a recording that broke off: the first reason, and whether it was memory."""

import sys

import pytest
import torch

from prismatic.models.graphs import first_reason, is_memory


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("operation not permitted when stream is capturing"), False),
    ],
)
def test_missing_memory_is_known_by_all_its_names(error: Exception, memory: bool) -> None:
    assert is_memory(error) is memory


def broken_off(*reasons: Exception) -> BaseException:
    """The last of errors each of which was raised while the one before was handled, as seen by who catches it while handling ValueError."""

    def raise_from(left: list[Exception]) -> None:
        *before, last = left
        try:
            if before:
                raise_from(before)
        finally:
            raise last

    try:
        raise ValueError("the caller's own")
    except ValueError:
        handled = sys.exception()
        try:
            raise_from(list(reasons))
        except Exception as error:
            return first_reason(error, handled)
    raise AssertionError


def test_the_reason_is_the_first_error_unless_memory_was_short() -> None:
    first, second = RuntimeError("first"), RuntimeError("operation failed due to a previous error during capture")
    assert broken_off(first, second) is first
    memory = torch.OutOfMemoryError("CUDA out of memory")
    assert broken_off(KeyError("not cached yet"), memory, second) is memory
