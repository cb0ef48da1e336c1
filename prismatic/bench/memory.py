"""What fits on which GPU, planned and not measured: openvla-7b, the largest micro-batch that leaves a tenth of the memory free.

In: GiB of the GPUs. Out: a table of finetune.py's own plans (training/memory.py), counted on tensors without memory. Needs no GPU.
"""

from collections.abc import Sequence

import torch

from prismatic.bench.instruments import GIB, Row
from prismatic.models.vla import VLAConfig
from prismatic.training.activations import SHARDED, Precision
from prismatic.training.memory import Settings, describe, largest_batch, plan

TOKENS = 40  # of the longest row: a LIBERO instruction with its prompt, and the action
SPARE = 0.1  # of the memory: for the driver, ECC, and what the plan doesn't know
MOST = 64  # samples of a micro-batch that are tried
PROCESSES = (1, 4, 8)  # GPUs among which every weight is trained


def run(cards: Sequence[float], config: VLAConfig | None = None) -> list[Row]:
    """Adapters on each GPU, then every weight on several of the largest (--shard): kept in float32, computed in bfloat16."""
    config, largest = config or VLAConfig(), max(cards)
    lora = describe(config, Precision(), words=TOKENS)
    alone = describe(config, Precision(lora_rank=0, base_dtype=torch.float32, autocast=True), words=TOKENS)
    shared = describe(config, SHARDED, words=TOKENS)
    cases = [
        (f"{card:g} GB", card, "LoRA r=32", "NF4" if nf4 else "bfloat16", lora, Settings(1, 1, recomputed, nf4))
        for card in cards
        for nf4, recomputed in ((False, False), (False, True), (True, True))  # the fastest first
    ]
    cases += [
        (f"{n} x {largest:g} GB", largest, "every weight", "float32", alone if n == 1 else shared, Settings(1, 1, True, shares=n))
        for n in PROCESSES
    ]  # fmt: skip
    rows = []
    for name, card, trained, base, model, settings in cases:
        batch = largest_batch(model, settings, int((1 - SPARE) * card * GIB), sizes=range(MOST, 0, -1))
        planned = plan(model, settings.at(batch or 1)).total / GIB
        rows.append(
            {
                "card": name,
                "trained": trained,
                "base": base,
                "recomputed": "yes" if settings.gradient_checkpointing else "no",
                "largest micro-batch": f"{MOST} and more" if batch == MOST else batch or "doesn't fit",
                "planned GiB": f"{planned:.1f}" if batch else f"{planned:.1f} at 1",
            }
        )
    return rows
