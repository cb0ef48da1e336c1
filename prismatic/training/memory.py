"""What a training run will take of a card, before anything is loaded. In: a VLAConfig, settings, the card's free bytes. Out: a plan in lines,
and the setting that was left to it (gradient_checkpointing None); what can't fit is one sentence with the settings that would.

Weights, adapters, gradients and optimizer are counted from the model without memory (meta device), activations from its own code
(activations.py). The plan is the steady state: gradients of earlier passes and the optimizer's state are there when activations peak.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from prismatic.errors import ConfigError
from prismatic.machine import available_memory
from prismatic.models.lora import add_lora
from prismatic.models.lora_dtype import casting_layers, compute_in_base_dtype, halves_of
from prismatic.models.nf4 import BYTES_PER_VALUE, quantised_linears
from prismatic.models.unused import unused_parameters
from prismatic.models.vla import VLA, VLAConfig
from prismatic.training.activations import SELECTIVE, Checkpointing, Piece, Precision, pieces

GIB = 2**30
EIGHT_BIT_STATE = 2 * (1 + 4 / 256)  # bytes a value: two moments, each with a float32 scale for 256 values
RESERVE_SHARE = 0.03  # of all else, for the allocator's rounding; an allowance, not measured
RESERVE_BYTES = 64 * 2**20  # for cuBLAS' workspaces, likewise
PROCESSES_BYTES = 2**30  # of each card of several: NCCL's buffers, DDP's buckets while they are laid anew; likewise
TOWERS = ("dino", "siglip")


@dataclass(frozen=True)
class Model:
    """What counts of a model and its number formats."""

    base: int  # values without adapters
    linear: int  # of them those that NF4 packs
    largest: int  # values of the largest packed matrix
    adapters: int  # values, a head's included
    cast: int  # of them those of which a step makes copies in the base's dtype (cast_once)
    trained: int  # values that ever get a gradient: not those of blocks that aren't run
    depths: Mapping[str, int]  # blocks that are run, by kind
    block: int  # values of the largest of them
    outside: int  # values in none of them
    of_one: Mapping[tuple[str, Checkpointing], Piece]  # activations at batch 1
    of_two: Mapping[tuple[str, Checkpointing], Piece]  # and at batch 2: the rest lies on the line through both
    precision: Precision

    def piece(self, kind: str, batch_size: int, way: Checkpointing = False) -> Piece:
        """Bytes of one block of a kind at a batch size."""
        one, two = self.of_one[kind, way], self.of_two[kind, way]
        more = batch_size - 1
        return Piece(one.saved + more * (two.saved - one.saved), one.peak + more * (two.peak - one.peak))


@dataclass(frozen=True)
class Settings:
    """What a person may change to make it fit. gradient_checkpointing None: the least that makes it fit."""

    batch_size: int
    grad_accumulation_steps: int
    gradient_checkpointing: Checkpointing | None = None
    use_quantization: bool = False
    optimizer: str = "adamw"
    shares: int = 1  # processes among which weights, gradients and optimizer are cut up (--shard)

    def at(self, batch_size: int) -> "Settings":
        """The same with another micro-batch."""
        return dataclasses.replace(self, batch_size=batch_size)

    @property
    def flags(self) -> str:
        parts = [f"--batch_size {self.batch_size} --grad_accumulation_steps {self.grad_accumulation_steps}"]
        if self.gradient_checkpointing:
            parts.append(f"--gradient_checkpointing {self.gradient_checkpointing}")
        parts += ["--use_quantization True"] * self.use_quantization
        parts += [f"--optimizer {self.optimizer}"] * (self.optimizer != "adamw")
        return " ".join(parts)


@dataclass(frozen=True)
class Plan:
    """Bytes at the worst moment of a step, by what takes them."""

    settings: Settings
    parts: Mapping[str, int]  # weights, adapters, gradients, optimizer, activations, logits, reserve

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def need(self) -> str:
        return f"{self.settings.flags} needs {self.total / GIB:.1f} GiB"


def describe(config: VLAConfig, precision: Precision, *, words: int, on_cpu: bool = False) -> Model:
    """Count a model of which nothing is loaded. words: ids of the longest row, without patches. on_cpu: where it will run."""
    with torch.device("meta"):
        vla = VLA(config)
        linears = [module.weight.numel() for _, module in quantised_linears(vla, on_cpu=on_cpu)]
        if precision.lora_rank:
            add_lora(vla, rank=precision.lora_rank, dropout=precision.lora_dropout)
            if precision.lora_dtype != precision.base_dtype:
                compute_in_base_dtype(vla)
        cast = sum(half.numel() for _, layer in casting_layers(vla) for half in halves_of(layer))
    # new heads are trained whole, and kept as the adapters are
    adapters = sum(p.numel() for p in vla.parameters() if p.requires_grad) if precision.lora_rank else 0
    base = sum(p.numel() for p in vla.parameters()) - adapters
    of_one, of_two = (pieces(config, precision, batch_size=size, words=words, on_cpu=on_cpu) for size in (1, 2))
    vision = vla.vision_backbone
    towers = dict(zip(TOWERS, (vision.featurizer, vision.fused_featurizer), strict=True))
    unread = set(unused_parameters(vla))
    trained = sum(p.numel() for name, p in vla.named_parameters() if p.requires_grad and name not in unread)
    depths = {name: len(tower.blocks) - 1 for name, tower in towers.items()}
    depths["layer"] = config.text_config.num_hidden_layers
    return Model(
        base=base,
        linear=sum(linears),
        largest=max(linears, default=0),
        adapters=adapters,
        cast=cast,
        trained=trained,
        depths=depths,
        block=max(sum(p.numel() for p in block.parameters()) for block in vla.blocks()),
        outside=base - sum(p.numel() for block in vla.blocks() for p in block.parameters()),
        of_one=of_one,
        of_two=of_two,
        precision=precision,
    )


def plan(model: Model, settings: Settings) -> Plan:
    """Bytes of a run. Pure: depends on nothing but its arguments."""
    computing = model.precision.base_dtype.itemsize
    size = (model.precision.shard_dtype or model.precision.base_dtype).itemsize
    own = model.precision.lora_dtype.itemsize if model.precision.lora_rank else size
    weights = model.base * size
    if settings.use_quantization:
        weights += int(model.linear * (BYTES_PER_VALUE - size))
    state = 2 * own if settings.optimizer == "adamw" else EIGHT_BIT_STATE
    activations, logits = _activations(model, settings)
    if settings.use_quantization:
        activations += model.largest * size  # a matrix is unpacked while it is used
    if settings.shares > 1:
        activations += _gathered(model, computing)
    shared = {
        "weights": weights,
        "adapters": model.adapters * own + model.cast * computing,
        "gradients": model.trained * own,
        "optimizer": int(model.trained * state),
    }
    parts = {name: size // settings.shares for name, size in shared.items()}
    parts |= {"activations": activations, "logits": logits}
    return Plan(settings, parts | {"reserve": int(RESERVE_SHARE * sum(parts.values())) + RESERVE_BYTES})


def _gathered(model: Model, computing: int) -> int:
    """Bytes of what a process that holds a share (FSDP2) has whole at a time: the block at work and the next, and what is in no block; the
    gradients of one block and of the rest; the float32 sum of one of them on its way to the others.
    """
    weights, gradients = 2 * model.block + model.outside, model.block + model.outside
    return computing * (weights + gradients) + 4 * max(model.block, model.outside)


def _activations(model: Model, settings: Settings) -> tuple[int, int]:
    """Bytes while the backward pass is where it takes most, and what the head adds to that."""
    size, way = settings.batch_size, settings.gradient_checkpointing or False
    blocks = {kind: model.piece(kind, size, way) for kind in model.depths}
    kept = {kind: depth * blocks[kind].saved for kind, depth in model.depths.items()}
    working = {kind: block.peak - block.saved for kind, block in blocks.items()}
    projector, head = model.piece("projector", size), model.piece("head", size)
    edges = sum(model.piece(f"{tower} patches", size).saved for tower in TOWERS)
    vision = edges + sum(kept[tower] for tower in TOWERS)
    everything = vision + projector.saved + kept["layer"]
    body = max(everything + working["layer"], vision + projector.peak, *(vision + working[tower] for tower in TOWERS))
    return body, max(everything + head.peak - body, 0)


def choose(model: Model, settings: Settings, card: int, *, place: str) -> Plan:
    """The plan of settings, with gradient_checkpointing decided where it is None: nothing recomputed if that fits, else what is cheap, else all.

    card: free bytes of place. ConfigError that names settings of the same effective batch that fit, if these don't.
    """
    given = settings.gradient_checkpointing
    ways = (False, SELECTIVE, True) if given is None else (given,)
    asked = [plan(model, dataclasses.replace(settings, gradient_checkpointing=way)) for way in ways]
    if fitting := next((found for found in asked if found.total <= card), None):
        return fitting
    others = [plan(model, smaller) for smaller in _smaller(settings, quantisable=model.precision.lora_rank > 0)]
    short = f"{asked[-1].need}, but {place} has {card / GIB:.1f} GiB free"
    if fitting := next((found for found in others if found.total <= card), None):
        raise ConfigError(f"{short}: {fitting.need} (the same effective batch)")
    raise ConfigError(f"{short}, and even {others[-1].need}: take a larger card")


def _smaller(settings: Settings, *, quantisable: bool) -> Iterator[Settings]:
    """Settings that take less, the least change first; the effective batch stays."""
    effective = settings.batch_size * settings.grad_accumulation_steps
    packed = dict.fromkeys((settings.use_quantization, settings.use_quantization or quantisable))
    alone = settings.shares == 1  # bitsandbytes' moments can't be split
    optimizers = dict.fromkeys((settings.optimizer, "paged_adamw_8bit" if alone else settings.optimizer))
    batches = [size for size in range(settings.batch_size, 0, -1) if effective % size == 0]
    for use_quantization, optimizer, batch in itertools.product(packed, optimizers, batches):
        yield Settings(batch, effective // batch, True, use_quantization, optimizer, settings.shares)


def largest_batch(model: Model, settings: Settings, card: int, sizes: Iterable[int]) -> int:
    """The first of these micro-batches that fits; 0 if none does."""
    return next((size for size in sizes if plan(model, settings.at(size)).total <= card), 0)


def lines(chosen: Plan, model: Model, card: int, *, place: str) -> Iterator[str]:
    """The plan as it is printed."""
    settings = chosen.settings
    effective = settings.batch_size * settings.grad_accumulation_steps
    divisors = (size for size in range(effective, 0, -1) if effective % size == 0)
    most = largest_batch(model, settings, card, divisors)
    unit, symbol, digits = (GIB, "GiB", 2) if chosen.total > GIB else (2**20, "MiB", 0)
    parts = ", ".join(f"{name} {size / unit:.{digits}f}" for name, size in chosen.parts.items())
    yield f"memory plan, {symbol}: {parts}"
    yield f"  together {chosen.total / unit:.{digits}f} of {card / unit:.{digits}f} free on {place} (planned from counted bytes)"
    yield (
        f"  {settings.batch_size} x {settings.grad_accumulation_steps} = {effective} samples a step, gradient_checkpointing "
        f"{settings.gradient_checkpointing}; up to {most} x {effective // most} would fit"
    )


def free_memory(device: str) -> tuple[int, str]:
    """Bytes that a run can take here, and of what: a card, or this machine's memory where the model runs on the CPU.

    Of a card a twentieth and 400 MiB are left for the libraries that torch loads with its first product, and for what lies in fragments.
    """
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
        return max(free - free // 20 - 400 * 2**20, 0), torch.cuda.get_device_name(device)
    return available_memory(), "this machine"
