"""A model of random weights for benchmarks: how fast a pass is, and what it takes, doesn't depend on them. In: sizes. Out: a VLA on a device."""

from pathlib import Path

import torch

from prismatic.models import weights
from prismatic.models.nf4 import prepare_nf4
from prismatic.models.vla import VLA, VLAConfig


def random_model(
    config: VLAConfig, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0, nf4: bool = False
) -> VLA:
    """Made on the device tensor by tensor: N(0, 0.02²), biases too; norms and LayerScale 1. nf4: linear maps packed as by --use_quantization."""
    place = torch.device(device)
    generator = torch.Generator(place).manual_seed(seed)
    with torch.device("meta"):
        vla = VLA(config)

    def drawn(name: str, shape: torch.Size) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=place)
        if "norm" in name.rpartition(".")[0].rpartition(".")[2] or name.endswith("scale_factor"):
            return tensor.fill_(float(not name.endswith("bias")))
        return tensor.normal_(std=0.02, generator=generator)

    stored = {
        name: weights.StoredTensor(
            Path("random"), tuple(tensor.shape), lambda name=name, tensor=tensor: drawn(name, tensor.shape)
        )
        for name, tensor in vla.state_dict().items()
    }
    if nf4:
        prepare_nf4(vla, on_cpu=place.type == "cpu")
    weights.fill(vla, stored, dtype=dtype, device=str(place))
    return vla
