"""What fits on which card, planned and not measured: openvla-7b, a 40-word row, the largest micro-batch that leaves a tenth of the card free.

In: the cards' GiB. Out: a table of finetune.py's own plans (memory.py), counted on tensors without memory. Needs no card.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from prismatic.models.vla import VLAConfig
from prismatic.training.activations import SHARDED, Precision
from prismatic.training.memory import GIB, Model, Plan, Settings, describe, plan

WORDS = 40  # ids of the longest row: a LIBERO instruction with its prompt, and the action
SPARE = 0.1  # of the card: for the driver, ECC, and what the plan doesn't know
MOST = 64  # samples of a micro-batch that are tried
ADAPTERS = ((False, False), (False, True), (True, True))  # (NF4 base, recomputed), the fastest first
PROCESSES = (1, 4, 8)  # cards among which every weight is trained


def largest(model: Model, settings: Settings, card: float) -> Plan | None:
    """The plan of the largest micro-batch that fits into card (bytes); None if none does."""
    best = None
    for size in range(1, MOST + 1):
        tried = plan(model, dataclasses.replace(settings, batch_size=size))
        if tried.total > card:
            break
        best = tried
    return best


def _row(card: str, what: str, base: str, model: Model, settings: Settings, room: float) -> dict[str, Any]:
    found = largest(model, settings, room)
    batch = found.settings.batch_size if found else 0
    planned = (found or plan(model, settings)).total / GIB
    return {
        "card": card,
        "trained": what,
        "base": base,
        "recomputed": "yes" if settings.gradient_checkpointing else "no",
        "largest micro-batch": f"{MOST} and more" if batch == MOST else batch or "doesn't fit",
        "planned GiB": f"{planned:.1f}" if found else f"{planned:.1f} at 1",
    }


def run(cards: Sequence[float], config: VLAConfig | None = None) -> list[dict[str, Any]]:
    """Adapters on each card, then every weight on several of the largest."""
    config = config or VLAConfig()
    return [*_adapters(config, cards), *_whole(config, max(cards))]


def _adapters(config: VLAConfig, cards: Sequence[float]) -> Iterator[dict[str, Any]]:
    model = describe(config, Precision(), words=WORDS)
    for card in cards:
        for nf4, recomputed in ADAPTERS:
            settings, base = Settings(1, 1, recomputed, nf4), "NF4" if nf4 else "bfloat16"
            yield _row(f"{card:g} GB", "LoRA r=32", base, model, settings, (1 - SPARE) * card * GIB)


def _whole(config: VLAConfig, card: float) -> Iterator[dict[str, Any]]:
    """Every weight, on one card or shared out (--shard): kept in float32, computed in bfloat16."""
    alone = describe(config, Precision(lora_rank=0, base_dtype=torch.float32, autocast=True), words=WORDS)
    shared = describe(config, SHARDED, words=WORDS)
    for processes in PROCESSES:
        settings, model = Settings(1, 1, True, shares=processes), alone if processes == 1 else shared
        yield _row(f"{processes} x {card:g} GB", "every weight", "float32", model, settings, (1 - SPARE) * card * GIB)
