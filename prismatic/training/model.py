"""The model that is trained: what it will take of the GPU, then base, head and adapter in their dtypes with what makes them fit.

In: a base folder, the model's config and options. Out: a memory plan, printed before anything is loaded, and a VLA.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prismatic.checkpoint import load_vla
from prismatic.models.checkpointing import checkpoint_activations, compile_blocks, lean_activations
from prismatic.models.lora import add_lora
from prismatic.models.lora_dtype import compute_in_base_dtype
from prismatic.models.vla import VLA, VLAConfig
from prismatic.training import memory
from prismatic.training.activations import SELECTIVE, SHARDED, Checkpointing, Precision
from prismatic.training.distributed import Ranks, shard


@dataclass(frozen=True)
class ModelOptions:
    """config.py's options of these names."""

    use_lora: bool
    lora_rank: int
    lora_dropout: float
    lora_dtype: str  # "float32" or "bfloat16"
    use_quantization: bool
    autocast: str  # "auto", "bfloat16" or "none"
    gradient_checkpointing: bool | str  # or "selective" or "auto"
    optimizer: str
    compile: bool
    shard: bool

    def in_bfloat16(self, ranks: Ranks) -> bool:
        """Whether autocast is needed: on a GPU for weights that are trained; under an adapter the base is bfloat16 itself."""
        return self.autocast == "bfloat16" or (self.autocast == "auto" and ranks.device != "cpu" and not self.use_lora)

    def precision(self, ranks: Ranks) -> Precision:
        """On a GPU a base that isn't trained is bfloat16; what is trained is float32 unless lora_dtype says otherwise."""
        base = torch.bfloat16 if self.use_lora and ranks.device != "cpu" else torch.float32
        return Precision(
            lora_rank=self.lora_rank if self.use_lora else 0,
            lora_dropout=self.lora_dropout,
            base_dtype=base,
            lora_dtype=getattr(torch, self.lora_dtype),
            autocast=self.in_bfloat16(ranks),
        )


def plan_training(
    config: VLAConfig, options: ModelOptions, ranks: Ranks, *, sizes: tuple[int, int], tokens: int
) -> Checkpointing:
    """Print what the run will take of the GPU, and decide gradient_checkpointing where it is auto. ConfigError where it can't fit.

    sizes: (micro_batch_size, grad_accumulation_steps); tokens: of the longest row, without patches.
    """
    shares, device = ranks.size if options.shard else 1, ranks.device
    precision = SHARDED if shares > 1 and device != "cpu" else options.precision(ranks)
    model = memory.describe(config, precision, words=tokens, on_cpu=device == "cpu")
    checkpointing: Any = None if options.gradient_checkpointing == "auto" else options.gradient_checkpointing
    asked = memory.Settings(*sizes, checkpointing, options.use_quantization, options.optimizer, shares)
    free, place = memory.free_memory(device)
    if ranks.size > 1 and device != "cpu":
        free -= memory.PROCESSES_BYTES
    plan = memory.choose(model, asked, free, place=place)
    print(*memory.lines(plan, model, free, place=place), sep="\n")
    return plan.settings.gradient_checkpointing or False


def build_training_model(
    base: Path,
    resumed: Path | None,
    config: VLAConfig,
    options: ModelOptions,
    *,
    checkpointing: Checkpointing,
    ranks: Ranks,
) -> VLA:
    """Base with adapter and head, or all of a model; from the run's last checkpoint (resumed) if there is one. A new head and a new adapter
    are drawn from torch's random numbers.
    """
    precision = options.precision(ranks)
    # new heads where there are none yet
    names = ("action_head", "num_actions_chunk", "num_images_in_input", "proprio_dim", "action_dim")
    choice: dict[str, Any] = {"new_heads": True} | {name: getattr(config, name) for name in names}
    how: dict[str, Any] = {"dtype": precision.base_dtype, "device": ranks.device} | choice
    if options.use_lora:
        vla = load_vla(base, resumed, adapter_dtype=precision.lora_dtype, nf4=options.use_quantization, **how)
        if resumed is None:
            add_lora(vla, rank=precision.lora_rank, dropout=precision.lora_dropout)
        for parameter in vla.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(precision.lora_dtype)
        if precision.lora_dtype != precision.base_dtype:
            compute_in_base_dtype(vla)
    else:
        cut = (lambda vla: shard(vla, ranks)) if options.shard and ranks.size > 1 else None
        vla = load_vla(resumed or base, shard=cut, **how)
    lean_activations(vla)
    if checkpointing:
        checkpoint_activations(vla, selective=checkpointing == SELECTIVE)
    return compile_blocks(vla) if options.compile else vla
