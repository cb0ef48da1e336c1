"""Training steps a second and their memory: the plain way (plain.py) against ours, in one run, on random weights.

In: sizes. Out: a table. Before anything is timed both ways must give one loss and the same gradients. On a GPU the full size, peak memory is
torch.cuda.max_memory_reserved under a cap; on a CPU a small model, its peak is counted (live_bytes.py), not measured.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prismatic.bench.ceilings import matrix_rate, release_memory, wait
from prismatic.bench.memory import WORDS
from prismatic.bench.plain import PlainVLA
from prismatic.bench.random_model import random_model
from prismatic.errors import ConfigError
from prismatic.models.checkpointing import checkpoint_activations, compile_blocks, lean_activations
from prismatic.models.llama import LlamaConfig
from prismatic.models.lora import add_lora
from prismatic.models.lora_dtype import compute_in_base_dtype
from prismatic.models.vision import DINO_ID, SIGLIP_ID
from prismatic.models.vla import IGNORE, VLA, VLAConfig
from prismatic.training.activations import LABELS
from prismatic.training.live_bytes import LiveBytes
from prismatic.training.memory import Checkpointing
from prismatic.training.optimizer import make_optimizer

PLAIN, OURS = "plain", "ours"
TOO_LARGE = "doesn't fit"
RANK = 32
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative, of the loss and of all gradients together
SMALL = VLAConfig(  # every part has about the share of the work that it has at full size; 256 patches as there
    tiny_timm_kwargs={
        name: {"embed_dim": 96, "depth": 12, "num_heads": 3, "patch_size": 14} for name in (DINO_ID, SIGLIP_ID)
    },
    text_config=LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4, vocab_size=1088
    ),
    pad_token_id=1024,
    empty_token_id=3,
)  # fmt: skip
SIZES = {"cuda": (1, 2, 4, 8, 16, 32), "cpu": (1, 4)}  # micro-batches, where none are asked for
GIB = 2**30


@dataclass(frozen=True)
class Bench:
    """What is measured where."""

    config: VLAConfig
    device: str
    dtype: torch.dtype
    steps: int
    seed: int = 0

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)


def random_base(bench: Bench, *, nf4: bool = False) -> VLA:
    """The model that is trained."""
    return random_model(bench.config, dtype=bench.dtype, device=bench.device, seed=bench.seed, nf4=nf4)


def with_adapter(model: nn.Module, bench: Bench) -> Any:
    """LoRA in float32, as both ways train it, the second half not zero: else half of the gradients would be."""
    torch.manual_seed(bench.seed)
    add_lora(model, rank=RANK)  # pyright: ignore[reportArgumentType]  (any module whose names are a VLA's)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.01)
    return model.train()


def ours(base: VLA, bench: Bench, *, checkpointing: Checkpointing, compiled: bool = False) -> VLA:
    """Our way on the base's weights: one copy of them, a structure of its own."""
    if any(type(module).__name__ == "Linear4bit" for module in base.modules()):
        vla = base
    else:
        with torch.device("meta"):
            vla = VLA(base.config)
        vla.load_state_dict(base.state_dict(), assign=True)
    with_adapter(vla, bench)
    if bench.dtype != torch.float32:
        compute_in_base_dtype(vla)
    lean_activations(vla)
    if checkpointing:
        checkpoint_activations(vla, selective=checkpointing == "selective")
    if compiled:
        compile_blocks(vla)
    return vla


def batch_of(bench: Bench, size: int, number: int = 0) -> dict[str, torch.Tensor]:
    """Random rows: BOS, words, and at the end what is trained on; others for each number."""
    generator = torch.Generator().manual_seed(bench.seed + 1 + number)
    config, side = bench.config, bench.config.image_size
    ids = torch.randint(3, config.vocab_size, (size, WORDS), generator=generator)
    labels = ids.clone()
    labels[:, :-LABELS] = IGNORE
    pixels = torch.randn(size, 6 * config.num_images_in_input, side, side, generator=generator)
    rows = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool), "pixel_values": pixels, "labels": labels,
    }  # fmt: skip
    return {name: tensor.to(bench.device) for name, tensor in rows.items()}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor], bench: Bench) -> torch.Tensor:
    """Ours computes in the base's format; the plain way leaves that to autocast, as the original does."""
    plain = isinstance(model, PlainVLA)
    with torch.autocast(bench.device, dtype=torch.bfloat16, enabled=plain and bench.dtype == torch.bfloat16):
        out = model(**batch)
    return out if plain else out.loss


def gradients(model: nn.Module, batch: dict[str, torch.Tensor], bench: Bench) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and every gradient of one pass."""
    loss = loss_of(model, batch, bench)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def check_equal(base: VLA, bench: Bench) -> tuple[float, float]:
    """Relative difference of loss and gradients between the two ways; ConfigError where one is above the tolerance."""
    batch = batch_of(bench, 1 if bench.on_gpu else 2)  # at full size two rows of the plain way hardly fit under the cap
    plain_loss, plain = gradients(with_adapter(PlainVLA.share(base), bench), batch, bench)
    our_loss, mine = gradients(ours(base, bench, checkpointing=True), batch, bench)
    if set(plain) != set(mine):
        raise ConfigError(f"the two ways train other parameters: {sorted(set(plain) ^ set(mine))[0]}")
    squares = sum((plain[name] - mine[name]).square().sum().item() for name in plain)
    gradient = math.sqrt(squares / sum(g.square().sum().item() for g in plain.values()))
    loss = abs(plain_loss - our_loss) / plain_loss
    limit = TOLERANCE[bench.dtype]
    if not (loss <= limit and gradient <= limit):
        raise ConfigError(
            f"the two ways differ: loss {loss:.1e}, gradients {gradient:.1e}, at most {limit:.0e} is allowed"
        )
    return loss, gradient


def step_flops(base: VLA, bench: Bench) -> int:
    """Operations that one sample's forward and backward pass need, without anything computed twice."""
    vla = ours(base, bench, checkpointing=False)
    with FlopCounterMode(display=False) as counter:
        gradients(vla, batch_of(bench, 1), bench)
    return counter.get_total_flops()


def step_of(model: nn.Module, bench: Bench, size: int, *, way: str) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A training step of one way: pass, optimizer, gradients gone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if way == PLAIN:
        optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.01)
    else:
        optimizer = make_optimizer("adamw", trained, learning_rate=1e-5, weight_decay=0.01)
    batch = batch_of(bench, size)

    def step() -> None:
        loss_of(model, batch, bench).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def measure(make: Callable[[], nn.Module], bench: Bench, size: int, *, way: str) -> tuple[float, float]:
    """Samples a second and peak GiB of training steps; torch.OutOfMemoryError where it doesn't fit."""
    model = make()
    step, optimizer = step_of(model, bench, size, way=way)
    step()  # the optimizer's state and the libraries' plans are made
    counted = 0
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step()
    else:
        with LiveBytes() as live:
            step()
        held = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}
        state = [t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        counted = live.peak + sum(held.values()) + sum(state)
    seconds = []
    for _ in range(bench.steps):
        wait(bench.place)
        start = time.perf_counter()
        step()
        wait(bench.place)
        seconds.append(time.perf_counter() - start)
    rate = size / statistics.median(seconds)
    return rate, (torch.cuda.max_memory_reserved() if bench.on_gpu else counted) / GIB


def tried(make: Callable[[], nn.Module], bench: Bench, size: int, *, way: str) -> tuple[float, float] | str:
    """As measure; or why not. It begins without what was cached before: that would count as reserved."""
    release_memory()
    try:
        return measure(make, bench, size, way=way)
    except torch.OutOfMemoryError:
        return TOO_LARGE
    finally:
        release_memory()


def run(
    *,
    full_size: bool | None,
    memory_cap_gib: float,
    batch_sizes: tuple[int, ...] | None,
    steps: int,
    compiled: bool,
) -> list[dict[str, Any]]:
    """The table. full_size None: where there is a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    full_size = device == "cuda" if full_size is None else full_size
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bench = Bench(VLAConfig() if full_size else SMALL, device, dtype, steps)
    if device == "cuda":
        cap = memory_cap_gib * GIB / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(cap, 1.0))
    base = random_base(bench)
    loss, gradient = check_equal(base, bench)
    print(f"the two ways agree: relative difference of the loss {loss:.1e}, of the gradients {gradient:.1e}")
    facts = {"rate": matrix_rate(bench.place, dtype), "flops": step_flops(base, bench)}
    rows = list(_rows(base, bench, batch_sizes or SIZES[device], compiled=compiled))
    del base
    found = tried(lambda: ours(random_base(bench, nf4=True), bench, checkpointing=True), bench, 1, way=OURS)
    rows.append(Row("ours, NF4 base", 1, True, found))
    return _table(rows, bench, **facts)


@dataclass(frozen=True)
class Row:
    way: str
    size: int
    checkpointing: bool
    found: tuple[float, float] | str  # samples a second, GiB; or why there are none


def _rows(base: VLA, bench: Bench, sizes: tuple[int, ...], *, compiled: bool) -> Iterator[Row]:
    """Both ways at each micro-batch, ours with and without recomputing; a way that fails at one is not tried at larger ones."""
    failed: set[tuple[str, bool]] = set()
    ways = [(PLAIN, False), (OURS, False), (OURS, True)]
    for size, (way, checkpointing) in itertools.product(sizes, ways):
        if (way, checkpointing) in failed:
            continue

        def make(way: str = way, checkpointing: bool = checkpointing) -> nn.Module:
            if way == PLAIN:
                return with_adapter(PlainVLA.share(base), bench)
            return ours(base, bench, checkpointing=checkpointing, compiled=compiled)

        found = tried(make, bench, size, way=way)
        if isinstance(found, str):
            failed.add((way, checkpointing))
        yield Row(way, size, checkpointing, found)


def _table(rows: list[Row], bench: Bench, *, rate: float, flops: int) -> list[dict[str, Any]]:
    """ratio: to the plain way at the same micro-batch, or where that doesn't fit at its largest."""
    plain = {row.size: row.found for row in rows if row.way == PLAIN and isinstance(row.found, tuple)}
    place = torch.cuda.get_device_name(0) if bench.on_gpu else "CPU"
    table = []
    for row in rows:
        measured = isinstance(row.found, tuple)
        speed, memory = row.found if isinstance(row.found, tuple) else (0.0, 0.0)
        against = plain[row.size if row.size in plain else max(plain)][0] if plain else None
        table.append(
            {
                "way": row.way,
                "micro-batch": row.size,
                "recomputed": "yes" if row.checkpointing else "no",
                "samples/s": round(speed, 3) if measured else row.found,
                "ratio": round(speed / against, 2) if measured and against else "",
                "peak GiB": round(memory, 3) if measured else "",
                "of the matrix rate": f"{speed * flops / rate:.0%}" if measured else "",
                "on": f"{place}, {str(bench.dtype).removeprefix('torch.')}",
            }
        )
    return table
