"""Linear maps of a float32 model on a CPU through oneDNN, their weights laid out once for it: a pass over a built model that will only act.

torch multiplies through MKL, which on an AMD processor leaves half of the vector units idle; oneDNN does not, and pays off where many columns
are read at once. Sums are added in another order, so results differ in the last bits. Packed layers have no `weight` and cannot be saved.
"""

import torch
from torch import nn

HEAD = "lm_head"  # stays: decoding multiplies some of its rows only


class PackedLinear(nn.Module):
    """A float32 nn.Linear for acting on a CPU; its weight is kept in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(vla: nn.Module) -> nn.Module:
    """Replace the plain float32 linear maps on the CPU, the head excepted, in place; returns vla. Others (adapters, quantised) stay."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return vla
    for parent in list(vla.modules()):
        for name, child in list(parent.named_children()):
            plain = type(child) is nn.Linear and type(child.weight) is nn.Parameter
            if plain and name != HEAD and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child))
    return vla
