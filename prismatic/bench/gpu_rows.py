"""The rows of `bench.py gpu`: `python -m prismatic.bench.gpu_rows NAME FILE` adds to FILE a JSON line for each thing that it measures.

On a GPU openvla-7b's size with random weights, on a CPU the small model.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prismatic.atomic import append_line
from prismatic.bench import infer, train
from prismatic.bench.infer import ACTION_DIM, inputs
from prismatic.bench.instruments import GIB, Row, bandwidth, digits, matrix_rate, seconds_of, wait
from prismatic.machine import uses_gpu
from prismatic.models import integers
from prismatic.models.compiled import NO_GRAPHS, CompiledActionDecoder, compile_step
from prismatic.models.decode import ActionDecoder
from prismatic.models.quantize import PRECISIONS, plan, quantize
from prismatic.models.quantized import bitsandbytes_linear, quantized_linear
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import VLA, VLAConfig

GPU = uses_gpu()
DEVICE, CPU = torch.device("cuda" if GPU else "cpu"), torch.device("cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
ROUNDS = 20 if GPU else 2
WIDTHS = (4096, 11008) if GPU else (128, 256)
PRODUCT_ROWS = (1, 6, 16, 289)  # a step of plain decoding, of verifying, of two such rows and more, a prompt


def environment() -> Iterator[Row]:
    """Card, versions, and the ceilings that the other numbers are held against."""
    card = torch.cuda.get_device_properties(0) if GPU else None
    yield {
        "card": card.name if card else "none: CPU", "GiB": round(card.total_memory / GIB, 1) if card else 0,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if GPU else "",
        "python": sys.version.split()[0], "torch": torch.__version__, "CUDA": torch.version.cuda or "",
    }  # fmt: skip
    rates = bandwidth(DEVICE), matrix_rate(DEVICE, DTYPE)
    yield {"GB/s": round(rates[0] / 1e9), "TFLOP/s": digits(rates[1] / 1e12), "dtype": str(DTYPE)}


def equal() -> Iterator[Row]:
    """The small model here and on the CPU, in float32: tokens and gradients; compiled against eager; integers against what they stand for."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    here, there = (random_vla(TINY, seed=0).eval().to(device) for device in (DEVICE, CPU))
    ids, pixels = inputs(here, 4)
    eager = ActionDecoder(here)(ids, pixels, ACTION_DIM)
    same = eager.ids.cpu() == ActionDecoder(there)(ids.cpu(), pixels.cpu(), ACTION_DIM).ids
    yield {"what": "tokens equal to the CPU's", "%": digits(100 * same.float().mean().item())}
    benches = [train.Bench(TINY, device, torch.float32, steps=1) for device in (DEVICE, CPU)]
    models = [train.model_of(benches[1], "ours").to(bench.device) for bench in benches]
    found, expected = (train.gradients(*pair, 2)[1] for pair in zip(models, benches, strict=True))
    errors = [(found[name].cpu() - g).norm().item() / (g.norm().item() or 1) for name, g in expected.items()]
    yield {"what": "largest relative difference of a gradient to the CPU's", "value": digits(max(errors))}
    compiled = CompiledActionDecoder(here, compiler=compiler())
    answers = [compiled(ids, pixels, ACTION_DIM, draft=d).ids for d in (None, eager.ids, eager.ids.flip(1))]
    yield {
        "what": "compiled", "tokens equal to eager, %": digits(100 * (answers[0] == eager.ids).float().mean().item()),
        "drafts change nothing": all(answer.equal(answers[0]) for answer in answers), "decoder": compiled.description,
    }  # fmt: skip
    oft, state = infer.as_oft(here), torch.zeros(len(ids), infer.STATE, device=DEVICE)
    plain, chunks = ActionDecoder(oft), CompiledActionDecoder(oft, compiler=compiler())
    difference = (plain.chunk(ids, pixels, state)[0] - chunks.chunk(ids, pixels, state)[0]).abs().max().item()
    yield {
        "what": "compiled chunk, float32: largest difference to eager",
        "value": digits(difference),
        "decoder": chunks.description,
    }
    for precision in PRECISIONS:
        vla, exact = (random_vla(TINY, seed=0).eval().to(DEVICE, DTYPE) for _ in range(2))
        for name, kind in plan(exact, precision).items():
            linear: Any = exact.get_submodule(name)
            linear.weight.data = integers.to_float(integers.to_parts(kind, linear.weight)).to(DTYPE)
        logits = [one(ids, None, pixels).logits for one in (quantize(vla, precision), exact)]
        error = (logits[0] - logits[1]).norm() / logits[1].norm()
        yield {"what": f"{precision} logits, relative error to their float weights", "value": digits(error.item())}
    is_compiled(f"{compiled.description}; chunks: {chunks.description}")


def products() -> Iterator[Row]:
    """One matrix product of the feed-forward's size with few and many rows."""
    linear = nn.Linear(*WIDTHS, bias=False, device=DEVICE, dtype=DTYPE).requires_grad_(False)
    layers: dict[str, nn.Module] = {str(DTYPE).removeprefix("torch."): linear}
    layers |= {kind: quantized_linear(linear, kind, DTYPE) for kind in PRECISIONS}
    layers["int8, W8A8"] = quantized_linear(linear, "int8", DTYPE, int8_activations=True)
    if importlib.util.find_spec("bitsandbytes"):
        layers["NF4"] = bitsandbytes_linear(linear, "int4", DTYPE)
    for name, layer in layers.items():
        torch.compiler.reset()  # the layers share their code, and torch compiles one for eight shapes at the most
        step = layer if name == "NF4" else compiler()(layer.forward)
        for rows in PRODUCT_ROWS:
            x = torch.randn(rows, WIDTHS[0], device=DEVICE, dtype=DTYPE)
            with torch.inference_mode():
                took = seconds_of(partial(step, x), ROUNDS, DEVICE).median()
            yield {"weights": name, "rows": rows, "ms": digits(1e3 * float(took))}


def compiler() -> Callable[..., Any]:
    """As a policy compiles on a GPU; on a CPU the tracing alone, which takes seconds."""
    return compile_step if GPU else partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)


def actor() -> VLA:
    """openvla-7b with random weights on a GPU, the tiny model on a CPU."""
    return infer.random_actor(VLAConfig() if GPU else TINY, dtype=DTYPE, device=DEVICE)


def act(way: str) -> Iterator[Row]:
    """A way of infer.WAYS with nothing else in the process; of int8, int4 and "batch N" the compiled one. Compiled: with a right draft too."""
    precision = way if way in PRECISIONS else "none"
    batch = int(way.removeprefix("batch ")) if way.startswith("batch") else 1
    vla = actor() if precision == "none" else quantize(actor(), precision)
    ways = [way] if way in infer.WAYS and way != "compiled" else ["compiled", "right draft"]
    if not GPU and way == "plain compiled":  # minutes of a CPU's compiler
        ways = ["plain"]
    how = {"rounds": ROUNDS, "plain": {}, "decoder_of": partial(CompiledActionDecoder, compiler=compiler())}
    rows = infer.compare(vla, precision, batch, ways, **how)
    yield from rows  # also what the row then fails of
    for row in rows:
        if row["p50 ms"] == "":
            raise SystemExit(f"not measured: {row['note']}")
        is_compiled(row["note"])


def is_compiled(description: str) -> None:
    """End the row as failed where what is called compiled ran eagerly, or was not recorded as a CUDA graph."""
    if "eager for" in description or NO_GRAPHS in description:
        raise SystemExit(f"not compiled: {description}")


def profile() -> Iterator[Row]:
    """Kernels of one action and the time in which none ran."""
    vla = actor()
    ids, pixels = inputs(vla, 1)
    kind = torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]):  # its first start takes seconds
        wait(DEVICE)
    for name, decoder in (("eager", ActionDecoder(vla)), ("compiled", CompiledActionDecoder(vla, compiler=compiler()))):
        for _ in range(3):
            decoder(ids, pixels, ACTION_DIM)
        wait(DEVICE)
        with torch.profiler.profile(activities=[kind]) as profiler:
            began = time.perf_counter()
            decoder(ids, pixels, ACTION_DIM)
            wait(DEVICE)
            whole = 1e3 * (time.perf_counter() - began)
        # on a GPU not the calls that start kernels
        events = [event for event in profiler.key_averages() if event.device_type.name == DEVICE.type.upper()]
        busy = {e.key: (e.self_device_time_total if GPU else e.self_cpu_time_total) / 1e3 for e in events}
        slowest = sorted(busy, key=busy.__getitem__, reverse=True)[:5]
        yield {
            "way": name, "kernels": sum(e.count for e in events), "busy ms": digits(sum(busy.values())),
            "profiled ms": digits(whole), "slowest": [f"{key[:60]} {digits(busy[key])} ms" for key in slowest],
        }  # fmt: skip
        is_compiled(getattr(decoder, "description", ""))


def training(way: str) -> Iterator[Row]:
    """Samples a second under the memory cap. way: "plain N", "ours N", "compiled N" or "NF4 N", N the micro-batch."""
    kind, _, size = way.partition(" ")
    bench = train.Bench(VLAConfig() if GPU else TINY, DEVICE, DTYPE, steps=5 if GPU else 1)
    train.cap_memory(cap := float(os.environ.get("MEMORY_CAP_GIB", "22")))
    kind = "ours" if kind == "compiled" and not GPU else kind
    for recomputed in {"plain": (False,), "NF4": (True,)}.get(kind, train.RECOMPUTED):
        row = train.measure(bench, kind, int(size), recomputed) | {"cap GiB": cap}
        yield row
        if isinstance(said := row["samples/s"], str) and said != "doesn't fit":
            raise SystemExit(f"not measured: {said}")


def finetune() -> Iterator[Row]:
    """finetune.py itself on a data set of the user's, with the small model: that it starts, steps and saves."""
    root = os.environ.get("DATA_ROOT_DIR")
    missing = [name for name in ("tyro", "simplejpeg") if not importlib.util.find_spec(name)]
    if not root or missing:
        reason = f"{missing[0]} is not installed" if missing else "give a data set with --data_root_dir"
        yield {"result": f"left out: {reason}"}
        return
    out = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ".")).parent / "finetune"
    flags = {
        "vla_path": "checkpoints/openvla-tiny", "data_root_dir": root, "dataset_name": os.environ["DATASET_NAME"], "max_steps": 20,
        "save_steps": 20, "batch_size": 4, "run_root_dir": out, "cache_dir": out / "cache",
    }  # fmt: skip
    began = time.monotonic()
    command = [sys.executable, "finetune.py", *(f"--{name}={value}" for name, value in flags.items())]
    code = subprocess.run(command, stdout=sys.stderr).returncode
    took = digits(time.monotonic() - began)
    yield {"what": "20 steps of finetune.py, small model", "exit code": code, "seconds": took}
    if code:
        raise SystemExit(f"finetune.py ended with {code}: its log says why")


def measure(name: str) -> Iterator[Row]:
    """What a row of gpu.ROWS yields."""
    kind, _, way = name.partition(" ")
    alone = {"environment": environment, "equal": equal, "products": products, "profile": profile, "finetune": finetune}
    return {"act": act, "train": training}[kind](way) if way else alone[name]()


if __name__ == "__main__":
    for measured in measure(sys.argv[1]):
        append_line(Path(sys.argv[2]), json.dumps({"row": sys.argv[1], **measured}).encode())
