"""The rows of `bench.py gpu`: `python -m prismatic.bench.gpu_rows NAME` prints a JSON line for each thing that it measures.

On a GPU openvla-7b's size with random weights, on a CPU the small model. A profile's gaps are the time in which no kernel ran.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prismatic.bench import ceilings, train
from prismatic.bench.infer import ACTION_DIM, inputs, random_full_size
from prismatic.bench.plain import PlainDecoder
from prismatic.models import integers
from prismatic.models.compiled import CompiledActionDecoder, compile_step
from prismatic.models.decode import ActionDecoder
from prismatic.models.quantize import PRECISIONS, plan, quantize, stored_bytes
from prismatic.models.quantized import bitsandbytes_linear, quantized_linear
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import VLA, VLAConfig

Measured = Iterator[dict[str, Any]]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
ROUNDS = 20 if GPU else 2
WIDTHS = (4096, 11008) if GPU else (128, 256)
PRODUCT_ROWS = (1, 6, 16, 289)  # a step of plain decoding, of verifying, of tinygemm's best, a prompt
GIB = 2**30


def digits(number: float) -> float:
    """Three significant digits."""
    return float(f"{number:.3g}")


def milliseconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median of some calls, after two that make it warm."""
    times = []
    for _ in range(rounds + 2):
        ceilings.wait(DEVICE)
        began = time.perf_counter()
        work()
        ceilings.wait(DEVICE)
        times.append(1e3 * (time.perf_counter() - began))
    return digits(statistics.median(times[2:]))


def environment() -> Measured:
    """Card, versions, and the ceilings that the other numbers are held against."""
    card = torch.cuda.get_device_properties(0) if GPU else None
    yield {
        "card": card.name if card else "none: CPU", "GiB": round(card.total_memory / GIB, 1) if card else 0,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if GPU else "",
        "python": sys.version.split()[0], "torch": torch.__version__, "CUDA": torch.version.cuda or "",
    }  # fmt: skip
    rates = ceilings.bandwidth(DEVICE), ceilings.matrix_rate(DEVICE, DTYPE)
    yield {"GB/s": round(rates[0] / 1e9), "TFLOP/s": digits(rates[1] / 1e12), "dtype": str(DTYPE)}


def equal() -> Measured:
    """The small model here and on the CPU, in float32: tokens and gradients; compiled against eager; integers against what they stand for."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    here, there = (random_vla(TINY, seed=0).eval().to(device) for device in (DEVICE, "cpu"))
    ids, pixels = inputs(TINY, 4, torch.device("cpu"), torch.float32)
    eager = ActionDecoder(here)(ids.to(DEVICE), pixels.to(DEVICE), ACTION_DIM)
    same = eager.ids.cpu() == ActionDecoder(there)(ids, pixels, ACTION_DIM).ids
    yield {"what": "tokens equal to the CPU's", "%": digits(100 * same.float().mean().item())}
    bench = [train.Bench(TINY, device, torch.float32, steps=1) for device in (DEVICE.type, "cpu")]
    found = [train.gradients(train.ours(train.random_base(bench[1]), bench[1], checkpointing=False).to(b.device), train.batch_of(b, 2), b)
             for b in bench]  # fmt: skip
    worst = max(
        (g.cpu() - found[1][1][n]).norm().item() / (found[1][1][n].norm().item() or 1) for n, g in found[0][1].items()
    )
    yield {"what": "largest relative difference of a gradient to the CPU's", "value": digits(worst)}
    compiled = CompiledActionDecoder(here, compiler=compiler())
    answers = [
        compiled(ids.to(DEVICE), pixels.to(DEVICE), ACTION_DIM, draft=draft).ids
        for draft in (None, eager.ids, eager.ids.flip(1))
    ]
    alike = [answer.equal(answers[0]) for answer in answers]
    yield {
        "what": "compiled", "tokens equal to eager, %": digits(100 * (answers[0] == eager.ids).float().mean().item()),
        "drafts change nothing": all(alike), "decoder": compiled.description,
    }  # fmt: skip
    for precision in PRECISIONS:
        vla = random_vla(TINY, seed=0).eval().to(DEVICE, DTYPE)
        exact = random_vla(TINY, seed=0).eval().to(DEVICE, DTYPE)
        for name, kind in plan(exact, precision).items():
            linear = exact.get_submodule(name)
            linear.weight.data = integers.to_float(integers.to_parts(kind, linear.weight)).to(DTYPE)  # type: ignore[union-attr]
        logits = [one(ids.to(DEVICE), None, pixels.to(DEVICE)).logits for one in (quantize(vla, precision), exact)]
        error = (logits[0] - logits[1]).norm() / logits[1].norm()
        yield {"what": f"{precision} logits, relative error to their float weights", "value": digits(error.item())}


def products() -> Measured:
    """One matrix product of the feed-forward's size with few and many rows."""
    width, out = WIDTHS
    linear = nn.Linear(width, out, bias=False, device=DEVICE, dtype=DTYPE).requires_grad_(False)
    layers: dict[str, nn.Module] = {str(DTYPE).removeprefix("torch."): linear}
    for kind in PRECISIONS:
        layers[kind] = quantized_linear(linear, kind, DTYPE)
    layers["int8, W8A8"] = quantized_linear(linear, "int8", DTYPE, int8_activations=True)
    if importlib.util.find_spec("bitsandbytes"):
        layers["NF4"] = bitsandbytes_linear(linear, "int4", DTYPE)
    for name, layer in layers.items():
        step = layer if name == "NF4" else compiler()(layer.forward)
        for rows in PRODUCT_ROWS:
            x = torch.randn(rows, width, device=DEVICE, dtype=DTYPE)
            with torch.inference_mode():
                yield {"weights": name, "rows": rows, "ms": milliseconds(partial(step, x))}


def compiler() -> Callable[..., Any]:
    """As a policy compiles on a GPU; on a CPU the tracing alone, which takes seconds."""
    return compile_step if GPU else partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)


def model(precision: str = "none") -> VLA:
    """What acts: full size and random on a GPU."""
    vla = random_full_size(DTYPE, DEVICE) if GPU else random_vla(TINY, seed=0).eval()
    vla.requires_grad_(False)
    return vla if precision == "none" else quantize(vla, precision)


def act(way: str) -> Measured:
    """Milliseconds of an action and memory. way: plain, plain compiled, eager, compiled, int8, int4 or "batch N"."""
    precision = way if way in PRECISIONS else "none"
    batch = int(way.removeprefix("batch ")) if way.startswith("batch") else 1
    vla = model(precision)
    ids, pixels = inputs(vla.config, batch, DEVICE, DTYPE)
    facts: dict[str, Any] = {"batch": batch, "weights GB": digits(stored_bytes(vla) / 1e9)}
    if way.startswith("plain"):
        plain = PlainDecoder(vla, best=way != "plain" and GPU)
        took = milliseconds(lambda: plain(ids, pixels, ACTION_DIM))
        yield facts | {"ms": took, "actions/s": digits(1e3 * batch / took), **memory()}
        return
    decoder = ActionDecoder(vla) if way == "eager" else CompiledActionDecoder(vla, compiler=compiler())
    began = time.monotonic()
    answer = decoder(ids, pixels, ACTION_DIM)
    yield {"first action s": digits(time.monotonic() - began), "decoder": decoder.description}
    for name, draft in (("", None), ("right draft", answer.ids)):
        took = milliseconds(lambda draft=draft: decoder(ids, pixels, ACTION_DIM, draft=draft))
        passes = decoder(ids, pixels, ACTION_DIM, draft=draft).forward_passes
        yield facts | {
            "draft": name,
            "forward passes": passes,
            "ms": took,
            "actions/s": digits(1e3 * batch / took),
            **memory(),
        }


def memory() -> dict[str, float]:
    """Peak that torch reserved, graphs included."""
    return {"peak GiB": digits(torch.cuda.max_memory_reserved() / GIB)} if GPU else {}


def profile() -> Measured:
    """Kernels of one action and the time between them."""
    vla = model()
    ids, pixels = inputs(vla.config, 1, DEVICE, DTYPE)
    for name, decoder in (("eager", ActionDecoder(vla)), ("compiled", CompiledActionDecoder(vla, compiler=compiler()))):
        for _ in range(3):
            decoder(ids, pixels, ACTION_DIM)
        ceilings.wait(DEVICE)
        kind = torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU
        began = time.perf_counter()
        with torch.profiler.profile(activities=[kind]) as profiler:
            decoder(ids, pixels, ACTION_DIM)
            ceilings.wait(DEVICE)
        whole = 1e6 * (time.perf_counter() - began)
        events = profiler.key_averages()
        busy = {e.key: e.self_device_time_total if GPU else e.self_cpu_time_total for e in events}
        slowest = sorted(busy, key=busy.__getitem__, reverse=True)[:5]
        yield {
            "way": name, "kernels": sum(e.count for e in events), "busy ms": digits(sum(busy.values()) / 1e3),
            "profiled ms": digits(whole / 1e3), "slowest": [f"{key[:60]} {digits(busy[key] / 1e3)} ms" for key in slowest],
        }  # fmt: skip


def training(way: str) -> Measured:
    """Samples a second under the memory cap. way: "plain N", "ours N", "compiled N", N the micro-batch, or NF4."""
    kind, _, size = way.partition(" ")
    cap = float(os.environ.get("MEMORY_CAP_GIB", "22"))
    bench = train.Bench(VLAConfig() if GPU else TINY, DEVICE.type, DTYPE, steps=5 if GPU else 1)
    if GPU:
        share = cap * GIB / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    tries: tuple[Any, ...] = (False,) if kind == "plain" else (True,) if kind == "NF4" else (False, "selective", True)
    for checkpointing in tries:
        if kind == "plain":
            make = lambda: train.with_adapter(train.PlainVLA.share(train.random_base(bench)), bench)  # noqa: E731
        else:
            make = partial(_ours, bench, checkpointing, kind)
        found = train.tried(make, bench, int(size or 1), way=train.PLAIN if kind == "plain" else train.OURS)
        facts = {"way": kind, "micro-batch": int(size or 1), "recomputed": str(checkpointing)}
        if isinstance(found, str):
            yield facts | {"result": found}
            continue
        yield facts | {"samples/s": digits(found[0]), "peak GiB": digits(found[1]), "cap GiB": cap}


def _ours(bench: train.Bench, checkpointing: Any, kind: str) -> nn.Module:
    base = train.random_base(bench, nf4=kind == "NF4")
    return train.ours(base, bench, checkpointing=checkpointing, compiled=kind == "compiled" and GPU)


def finetune() -> Measured:
    """finetune.py itself on a data set of the user's, with the small model: that it starts, steps and saves."""
    root = os.environ.get("DATA_ROOT_DIR")
    missing = [name for name in ("tyro", "simplejpeg") if not importlib.util.find_spec(name)]
    if not root or missing:
        reason = f"{missing[0]} is not installed" if missing else "give a data set with --data_root_dir"
        yield {"result": f"left out: {reason}"}
        return
    out = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ".")).parent / "finetune"
    command = [sys.executable, "finetune.py", "--vla_path", "checkpoints/openvla-tiny", "--data_root_dir", root, "--dataset_name",
               os.environ["DATASET_NAME"], "--max_steps", "20", "--save_steps", "20", "--batch_size", "4", "--run_root_dir", str(out),
               "--cache_dir", str(out / "cache")]  # fmt: skip
    began = time.monotonic()
    code = subprocess.run(command, stdout=sys.stderr).returncode
    yield {
        "what": "20 steps of finetune.py, small model",
        "exit code": code,
        "seconds": digits(time.monotonic() - began),
    }


def measure(name: str) -> Measured:
    """What a row of gpu.ROWS yields."""
    kind, _, way = name.partition(" ")
    if kind == "act":
        yield from act(way)
    elif kind == "train":
        yield from training(way)
    else:
        yield from {
            "environment": environment,
            "equal": equal,
            "products": products,
            "profile": profile,
            "finetune": finetune,
        }[name]()


if __name__ == "__main__":
    for measured in measure(sys.argv[1]):
        print(json.dumps(measured), flush=True)
