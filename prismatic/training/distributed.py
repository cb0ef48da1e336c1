"""One run in several processes: who this one is, what they agree on, how gradients (DDP) or weights (FSDP2) are shared.

In: torchrun's environment. Out: a Ranks. Surprising: with one process there is no process group, and every method is the plain thing. What
is small is exchanged over gloo on the CPU; NCCL carries gradients and weights.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from prismatic import machine
from prismatic.errors import ConfigError
from prismatic.models.unused import unused_parameters
from prismatic.models.vla import VLA

PATIENCE = timedelta(hours=2)  # how long ranks wait for one that builds a frame cache, downloads or saves
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which of them this is."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def on_main_process(self, action: Callable[[], T]) -> T:
        """Rank 0 does it, and all get its (small) answer. A ConfigError there ends all of them, said once."""
        if self.size == 1:
            return action()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = action()
            except ConfigError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        if answer[1] is not None:
            raise answer[1] if self.is_main else SystemExit(2)  # as errors.exit_codes leaves for it
        return answer[0]

    def main_process_first(self, action: Callable[[], T]) -> T:
        """Rank 0 does it, then all do, so that a download or a frame cache is made once and found by the others."""
        if self.size > 1:
            self.on_main_process(lambda: action() and None)
        return action()

    def mean(self, values: Sequence[float]) -> list[float]:
        """Of each value over the ranks."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.size).tolist()

    def gather(self, value: T) -> list[T]:
        """One (small) value a rank, in their order, on all ranks."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def whole(self, tree: T) -> T:
        """The tree (dicts, lists, …) with every sharded tensor put together on the CPU of rank 0; the others get empty ones. All ranks call it."""

        def put_together(tensor: DTensor) -> torch.Tensor:
            full = tensor.full_tensor()
            return full.cpu() if self.is_main else full.new_empty(0)

        return tree_map_only(DTensor, put_together, tree)

    def parallel(self, vla: VLA) -> nn.Module:
        """What to call in place of vla, so that gradients become the mean over the ranks; vla itself for one process or a sharded model."""
        if self.size == 1 or any(isinstance(parameter, DTensor) for parameter in vla.parameters()):
            return vla
        # DDP would wait for ever for a gradient of these.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(vla, unused_parameters(vla))
        devices = [torch.device(self.device)] if self.device != "cpu" else None
        return DistributedDataParallel(vla, device_ids=devices, gradient_as_bucket_view=True)


SINGLE_PROCESS = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The process group that torchrun's environment describes, for as long as the block lasts; only rank 0's prints are seen."""
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = machine.uses_gpu()
    machine.expandable_segments()
    if size == 1:
        yield Ranks(device="cuda" if on_gpu else "cpu")
        return
    device = machine.own_gpu(local) if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), size, device)
    with contextlib.ExitStack() as stack:
        if not ranks.is_main:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield ranks
    dist.destroy_process_group()  # only after success: with a rank gone it would wait


def no_sync(model: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which backward passes don't exchange gradients, where that is DDP's. FSDP2 always does: whole gradients may not fit."""
    return model.no_sync if isinstance(model, DistributedDataParallel) else contextlib.nullcontext


def shard(vla: VLA, ranks: Ranks) -> None:
    """Cut a (meta) model's parameters over the ranks, block by block, in place. On GPUs it computes in bfloat16 and reduces in float32."""
    mesh = init_device_mesh(torch.device(ranks.device).type, (ranks.size,))
    policy = MixedPrecisionPolicy()
    if ranks.device != "cpu":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)  # targets stay exact
    for block in vla.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(vla, mesh=mesh, mp_policy=policy)
    vla.to_empty(device=ranks.device)
