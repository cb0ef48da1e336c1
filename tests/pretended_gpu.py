"""Inductor's generated code for an H100 that isn't there: fake tensors on a pretended device, lowered as far as the source text."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

H100 = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 * 2**20, gcnArchName="",
)  # fmt: skip


class _Done(Exception):
    pass


def _forget_what_triton_can() -> None:
    """torch remembers for a process whether Triton works: neither may a test before this one decide it, nor this one for those after it."""
    for function in vars(_triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@contextlib.contextmanager
def _pretended() -> Iterator[None]:
    for lazy_init in (joint_graph.lazy_init, post_grad.lazy_init):  # they run small examples on the device
        with unset_fake_temporarily():
            lazy_init(torch.device("cpu"))
    target = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    driver.set_active(target)  # type: ignore[arg-type]
    answers: dict[str, Any] = {
        "torch.cuda.is_available": True, "torch.cuda.get_device_properties": H100, "torch.cuda._get_device_properties": H100,
        "torch.cuda.get_device_capability": (9, 0), "torch.cuda.current_device": 0, "torch.cuda.device_count": 1,
        "torch.accelerator.current_device_index": 0, "torch.cuda.get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": None, "torch.cuda.is_current_stream_capturing": False, "torch.cuda.synchronize": None,
        "torch.cuda._lazy_init": None, "torch.cuda.device.__enter__": None, "torch.cuda.device.__exit__": False,
        "torch._inductor.fx_passes.joint_graph.lazy_init": None, "torch._inductor.fx_passes.post_grad.lazy_init": None,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, lambda *a, answer=answer, **k: answer, create=True))
        _forget_what_triton_can()
        stack.callback(_forget_what_triton_can)
        yield


def generated_code(function: Callable[..., Any], *arguments: torch.Tensor) -> str:
    """The calls that torch.compile would make on the GPU for these (fake) arguments."""
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        graph, codes = make_fx(function)(*arguments), []

    def stop(lowered: GraphLowering) -> None:
        codes.append(lowered.codegen()[0].value)
        raise _Done

    settings = {name: False for name in ("fx_graph_cache", "shape_padding", "joint_graph_constant_folding")}
    with (
        _pretended(),
        inductor.patch(settings | {"compile_threads": 1}),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
    ):
        try:
            compile_fx(graph, list(arguments))
        except Exception:
            if not codes:
                raise
    return codes[0].partition("def call(")[2].partition("runner = Runner")[0]
