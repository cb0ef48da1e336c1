"""AdamW, as --optimizer names it: torch's fused one, or bitsandbytes' with 8-bit moments that move to the host when the card is full."""

import importlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """An optimizer over parameters. On a CPU there is nowhere to page to: the 8-bit one then keeps its moments where the weights are."""
    parameters = list(parameters)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    bitsandbytes: Any = importlib.import_module("bitsandbytes")  # here, because it loads a native library

    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    return bitsandbytes.optim.PagedAdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
