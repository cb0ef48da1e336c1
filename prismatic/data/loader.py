"""Samples → batches, read ahead by processes of their own. In: Examples and the draws of each batch. Out: an endless stream of batches."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from prismatic.data.examples import Examples
from prismatic.errors import ConfigError
from prismatic.processor import Batch

PREFETCHED = 2  # batches that each worker has ready
SLOWEST_BATCH = 600  # seconds


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # an ordinary end aborts now and then: the thread that sends batches may still be in C++
    atexit.register(os._exit, 0)
    # they may reach the whole group; the parent ends us
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _kill(workers: Iterable[Any]) -> None:
    """End them at once, without torch's handler, which would complain of their death. They take no SIGTERM."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, handler)


def batches(examples: Examples, draws: Iterator[list[int]], *, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Endless batches from the one at which draws begins; the workers read ahead. ConfigError where a worker is lost or none comes for long."""
    loader = DataLoader(
        examples,
        batch_sampler=draws,  # pyright: ignore[reportArgumentType]  (any iterable of index lists serves)
        collate_fn=examples.processor.collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        timeout=SLOWEST_BATCH if num_workers else 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # its own: it would draw from the model's random numbers, and a resumed run would part from a whole one
        multiprocessing_context="spawn" if num_workers else None,  # forkserver's workers outlive a killed trainer
        prefetch_factor=PREFETCHED if num_workers else None,
    )
    others, stream = set(multiprocessing.active_children()), iter(loader)
    workers = set(multiprocessing.active_children()) - others
    # whatever still held the stream at the end would leave them waiting, and this process for them
    atexit.register(_kill, workers)
    try:
        yield from stream
    except ConfigError as error:  # of a worker, with its traceback as text
        raise ConfigError(str(error).rpartition("ConfigError: ")[2].strip()) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):
            raise
        _kill(workers)  # one that is stuck would be waited for when this process ends
        raise ConfigError(
            f"the data loader gave no batch ({str(error).splitlines()[0]}): look for a full disk, memory or /dev/shm, or give --num_workers 0"
        ) from error
