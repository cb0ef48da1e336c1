"""Training steps a second and their memory: the plain way (plain.py) against ours, in one run, on random weights.

In: sizes. Out: a table. Before anything is timed both ways must give one loss and the same gradients. On a GPU the full size, peak memory is
torch.cuda.max_memory_reserved under a cap; on a CPU a small model, its peak is counted (live_bytes.py), not measured.
"""

import contextlib
import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from prismatic.bench.instruments import GIB, Row, random_model, release_memory, seconds_of
from prismatic.bench.memory import TOKENS
from prismatic.bench.plain import PlainVLA
from prismatic.errors import ConfigError, is_out_of_memory
from prismatic.machine import expandable_segments, uses_gpu
from prismatic.models.checkpointing import checkpoint_activations, compile_blocks, lean_activations
from prismatic.models.llama import LlamaConfig
from prismatic.models.lora import add_lora
from prismatic.models.lora_dtype import cast_once, compute_in_base_dtype
from prismatic.models.vision import DINO_ID, SIGLIP_ID
from prismatic.models.vla import IGNORE, VLAConfig
from prismatic.training.activations import LABELS, Checkpointing, shallow
from prismatic.training.live_bytes import LiveBytes
from prismatic.training.optimizer import make_optimizer

RANK = 32
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative, of the loss and of all gradients together
RECOMPUTED: tuple[Checkpointing, ...] = (False, "selective", True)
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


@dataclass(frozen=True)
class Bench:
    """What is measured where. steps: that are timed."""

    config: VLAConfig
    device: torch.device
    dtype: torch.dtype
    steps: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def model_of(bench: Bench, way: str, recomputed: Checkpointing = False) -> Any:
    """A model that trains an adapter. way: plain; or ours, compiled or on an NF4 base. The weights of all of them are the same."""
    base = random_model(bench.config, dtype=bench.dtype, device=bench.device, nf4=way == "NF4")
    model: Any = PlainVLA.share(base) if way == "plain" else base
    torch.manual_seed(0)
    add_lora(model, rank=RANK)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if ".lora_B." in name:  # zero, half of the gradients would be
                nn.init.normal_(parameter, std=0.01)
    if way == "plain":
        return model.train()
    if bench.dtype != torch.float32:
        compute_in_base_dtype(base)
    lean_activations(base)
    if recomputed:
        checkpoint_activations(base, selective=recomputed == "selective")
    return (compile_blocks(base) if way == "compiled" else base).train()


def batch_of(bench: Bench, size: int) -> dict[str, torch.Tensor]:
    """Random rows: BOS, tokens, and at the end what is trained on."""
    generator, config = torch.Generator().manual_seed(1), bench.config
    ids = torch.randint(3, config.vocab_size, (size, TOKENS), generator=generator)
    labels = ids.clone()
    labels[:, :-LABELS] = IGNORE
    shape = (size, 6 * config.num_images_in_input, config.image_size, config.image_size)
    pixels = torch.randn(shape, generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    rows = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "labels": labels}
    return {name: tensor.to(bench.device) for name, tensor in rows.items()}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor], bench: Bench) -> torch.Tensor:
    """Ours computes in the base's dtype; the plain way leaves that to autocast, as the original does."""
    if not isinstance(model, PlainVLA):
        return model(**batch).loss
    with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=bench.dtype == torch.bfloat16):
        return model(**batch)


def gradients(model: nn.Module, bench: Bench, size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and every gradient of one micro-batch."""
    loss = loss_of(model, batch_of(bench, size), bench)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_equal(bench: Bench) -> tuple[float, float]:
    """Relative difference of loss and gradients between the two ways; ConfigError where one is above the tolerance."""
    if bench.on_gpu:  # in bfloat16 rounding grows with depth, to 8 % of the gradients with all blocks
        bench = dataclasses.replace(bench, config=shallow(bench.config))
    plain_loss, plain = gradients(model_of(bench, "plain"), bench, 2)
    our_loss, ours = gradients(model_of(bench, "ours", True), bench, 2)
    if set(plain) != set(ours):
        raise ConfigError(f"the two ways train other parameters: {sorted(set(plain) ^ set(ours))[0]}")
    squares = sum((plain[name] - ours[name]).square().sum().item() for name in plain)
    gradient = math.sqrt(squares / sum(g.square().sum().item() for g in plain.values()))
    loss, limit = abs(plain_loss - our_loss) / plain_loss, TOLERANCE[bench.dtype]
    if not (loss <= limit and gradient <= limit):
        raise ConfigError(
            f"the two ways differ: loss {loss:.1e}, gradients {gradient:.1e}, at most {limit:.0e} is allowed"
        )
    return loss, gradient


def speed_and_peak(bench: Bench, way: str, size: int, recomputed: Checkpointing) -> tuple[float, float]:
    """Samples a second and peak GiB of training steps; RuntimeError where it doesn't fit."""
    model = model_of(bench, way, recomputed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw: Any = torch.optim.AdamW if way == "plain" else partial(make_optimizer, "adamw")
    rate = {"lr": 1e-5} if way == "plain" else {"learning_rate": 1e-5}
    optimizer, batch = adamw(trained, weight_decay=0.01, **rate), batch_of(bench, size)

    def step() -> None:
        with cast_once(model):
            loss_of(model, batch, bench).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimizer's state and the libraries' plans are made
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    live = LiveBytes()
    with contextlib.nullcontext() if bench.on_gpu else live:
        step()
    held = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}
    state = [t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    seconds = float(seconds_of(step, bench.steps, bench.device).median())
    peak = torch.cuda.max_memory_reserved() if bench.on_gpu else live.peak + sum(held.values()) + sum(state)
    return size / seconds, peak / GIB


def measure(bench: Bench, way: str, size: int, recomputed: Checkpointing) -> Row:
    """A row with numbers, or why there are none. It begins without what was cached before: that would count as reserved; and without what was
    compiled: blocks share their code, and torch compiles one for so many variants at the most, then runs it eagerly.
    """
    row: Row = {"way": way, "micro-batch": size, "recomputed": str(recomputed), "samples/s": "", "peak GiB": ""}
    release_memory()
    torch.compiler.reset()
    try:
        speed, peak = speed_and_peak(bench, way, size, recomputed)
        return row | {"samples/s": round(speed, 3), "peak GiB": round(peak, 3)}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return row | {"samples/s": "doesn't fit"}
    except ImportError as error:  # bitsandbytes
        return row | {"samples/s": str(error)}
    finally:
        release_memory()


def cap_memory(gib: float) -> None:
    """Let tensors take so much of the GPU, if there is one, from an allocator such as finetune.py has."""
    expandable_segments()
    if torch.cuda.is_available():
        share = gib * GIB / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))


def run(*, memory_cap_gib: float, batch_sizes: tuple[int, ...] | None, steps: int) -> list[Row]:
    """The table: a way that fails at a micro-batch is not tried at larger ones. ratio: to the plain way at the same micro-batch, or where that
    doesn't fit at its largest.
    """
    device = torch.device("cuda" if uses_gpu() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench = Bench(VLAConfig() if device.type == "cuda" else SMALL, device, dtype, steps)
    cap_memory(memory_cap_gib)
    loss, gradient = check_equal(bench)
    print(f"the two ways agree: relative difference of the loss {loss:.1e}, of the gradients {gradient:.1e}")
    ways = [("plain", False), *(("ours", recomputed) for recomputed in RECOMPUTED)]
    rows: list[Row] = []
    for size, (way, recomputed) in itertools.product(batch_sizes or SIZES[device.type], ways):
        before = [row for row in rows if (row["way"], row["recomputed"]) == (way, str(recomputed))]
        if not before or before[-1]["peak GiB"]:
            rows.append(measure(bench, way, size, recomputed))
    rows.append(measure(bench, "NF4", 1, True))
    plain = {row["micro-batch"]: row["samples/s"] for row in rows if row["way"] == "plain" and row["peak GiB"]}
    for row in rows:
        against = plain.get(row["micro-batch"], plain[max(plain)]) if plain else 0
        row["ratio"] = round(row["samples/s"] / against, 2) if row["peak GiB"] and against else ""
    return rows
