"""Float32 linear layers by oneDNN, for a model that acts on a CPU.

torch multiplies float32 with MKL, which keeps to AVX2 on AMD's processors; oneDNN, which comes with torch too, uses AVX-512 there: twice as
fast with a prompt's rows. It takes longer to begin, so small products stay where they are. On Intel's processors, whose AVX-512 MKL uses,
nothing was measured.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# Multiplications from which oneDNN is the faster one, with six rows or more. Measured on one core of an AMD EPYC with AVX-512: 15 microseconds
# or more for any product, even with MKL at 0.9 to 1.2 million, 1.4 times as fast at 2 million, twice at 6 million. With one row or two it gains
# from 10 million on and loses a tenth or two below: sizes that no layer here has (the small model's never get there, openvla-7b's are larger).
WORTHWHILE = 1 << 20


class OneDNNLinear(nn.Linear):
    """nn.Linear for inference: the product has no gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.numel() * self.out_features < WORTHWHILE:
            return F.linear(input, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def usable() -> bool:
    """Whether this processor has what makes it worthwhile, and this torch the operator (it is torch.compile's own)."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def twin_of(module: Any) -> Any:
    """Another module object with the same parts."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def with_onednn(module: Any) -> Any:
    """The same weights under modules whose float32 linear layers multiply with oneDNN; `module` stays as it is."""
    twin = twin_of(module)
    for name, part in module.named_children():
        twin._modules[name] = with_onednn(part)
    # quantised and adapted layers are classes of their own, or their weight is
    if type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.dtype == torch.float32:
        twin.__class__ = OneDNNLinear
    return twin
