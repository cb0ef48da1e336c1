"""The model that is trained: what it will take of the card, then base and adapter in their number formats with the passes that make it fit.

In: a base folder and options. Out: a Plan, printed before anything is loaded, and a VLA.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prismatic.checkpoint import load_vla
from prismatic.errors import ConfigError
from prismatic.filenames import CONFIG
from prismatic.models.checkpointing import checkpoint_activations, compile_blocks, lean_activations
from prismatic.models.lora import add_lora
from prismatic.models.lora_dtype import compute_in_base_dtype
from prismatic.models.vla import VLA, VLAConfig
from prismatic.training import memory
from prismatic.training.activations import SELECTIVE, SHARDED, Precision
from prismatic.training.distributed import Ranks, shard


@dataclass(frozen=True)
class ModelOptions:
    """config.py's options of these names. autocast: whether products are in bfloat16 where weights are float32."""

    use_lora: bool
    lora_rank: int
    lora_dropout: float
    lora_dtype: str  # "float32" or "bfloat16"
    use_quantization: bool
    autocast: bool
    gradient_checkpointing: bool | str  # or "selective" or "auto"
    optimizer: str
    compile: bool
    shard: bool

    def precision(self, device: str) -> Precision:
        """On a GPU a base that isn't trained is bfloat16; what is trained is float32 unless lora_dtype says otherwise."""
        base = torch.bfloat16 if self.use_lora and device != "cpu" else torch.float32
        return Precision(
            lora_rank=self.lora_rank if self.use_lora else 0,
            lora_dropout=self.lora_dropout,
            base_dtype=base,
            lora_dtype=getattr(torch, self.lora_dtype),
            autocast=self.autocast,
        )


def planned_model(
    base: Path, resumed: Path | None, options: ModelOptions, ranks: Ranks, *, batch_size: int, passes: int, words: int
) -> VLA:
    """Plan on rank 0, which says what the run will take, then build on all."""
    plan = ranks.on_first(
        lambda: plan_training(base, options, ranks, batch_size=batch_size, passes=passes, words=words)
    )
    cut = (lambda vla: shard(vla, ranks)) if options.shard and ranks.size > 1 else None
    checkpointing = plan.settings.gradient_checkpointing or False
    return build_training_model(base, resumed, options, checkpointing=checkpointing, device=ranks.device, cut=cut)


def plan_training(
    base: Path, options: ModelOptions, ranks: Ranks, *, batch_size: int, passes: int, words: int
) -> memory.Plan:
    """Print what the run will take of a card, and decide gradient_checkpointing where it is auto. ConfigError where it can't fit."""
    if options.use_quantization and not options.use_lora:
        raise ConfigError("--use_quantization packs a base that isn't trained: leave out --use_lora False")
    device, config = ranks.device, VLAConfig.from_json(base / CONFIG)
    shares = ranks.size if options.shard else 1
    precision = SHARDED if shares > 1 and device != "cpu" else options.precision(device)
    model = memory.describe(config, precision, words=words, on_cpu=device == "cpu")
    checkpointing: Any = None if options.gradient_checkpointing == "auto" else options.gradient_checkpointing
    ways = (checkpointing, options.use_quantization, options.optimizer, shares)
    asked = memory.Settings(batch_size, passes, *ways)
    free, place = memory.free_memory(device)
    if ranks.size > 1 and device != "cpu":
        free -= memory.PROCESSES_BYTES
    plan = memory.choose(model, asked, free, place=place)
    print(*memory.lines(plan, model, free, place=place), sep="\n")
    return plan


def build_training_model(
    base: Path,
    resumed: Path | None,
    options: ModelOptions,
    *,
    checkpointing: memory.Checkpointing,
    device: str,
    cut: Callable[[VLA], None] | None = None,
) -> VLA:
    """Base with adapter, or all of a model; from the run's last checkpoint (resumed) if there is one."""
    precision = options.precision(device)
    if options.use_lora:
        vla = _with_adapter(base, resumed, precision, nf4=options.use_quantization, device=device)
    else:
        vla = load_vla(resumed or base, dtype=precision.base_dtype, device=device, shard=cut)
    lean_activations(vla)
    if checkpointing:
        checkpoint_activations(vla, selective=checkpointing == SELECTIVE)
    return compile_blocks(vla) if options.compile else vla


def _with_adapter(base: Path, resumed: Path | None, precision: Precision, *, nf4: bool, device: str) -> VLA:
    dtype = precision.lora_dtype
    vla = load_vla(base, resumed, dtype=precision.base_dtype, device=device, adapter_dtype=dtype, nf4=nf4)
    if resumed is None:
        add_lora(vla, rank=precision.lora_rank, dropout=precision.lora_dropout)
    for parameter in vla.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return vla if dtype == precision.base_dtype else compute_in_base_dtype(vla)
