"""On another device than the CPU: nothing is left behind. Fake tensors compute nothing and need no GPU, but know where they are: a CPU tensor
among them raises, as it would on a GPU. Backward passes need a real one.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from prismatic.models.decode import prefill, verify
from prismatic.models.llama import empty_cache
from prismatic.models.tiny import TINY
from prismatic.models.vla import VLA
from prismatic.training.activations import Precision, fake_vla, shallow

BATCH, WORDS, ACTIONS = 2, 12, 7


def moved(vla: VLA, mode: FakeTensorMode) -> VLA:
    """The same with every parameter on a (fake) GPU."""
    for module in vla.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            with mode:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
            setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
    return vla


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv())  # the number of labels is known on the device only


def inputs(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    side = TINY.image_size
    pixels = torch.empty(BATCH, 6 * TINY.num_images_in_input, side, side, device=device)
    return torch.zeros(BATCH, WORDS, dtype=torch.int64, device=device), pixels


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_loss(mode: FakeTensorMode, lora_rank: int) -> None:
    vla = moved(fake_vla(shallow(TINY), Precision(lora_rank=lora_rank), mode), mode)
    with mode:
        ids, pixels = inputs("cuda")
        out = vla(ids, None, pixels, ids)
        assert out.loss is not None and out.loss.device.type == out.logits.device.type == "cuda"
        with pytest.raises(RuntimeError, match="cuda:0"):
            vla(ids, None, pixels, ids.cpu())  # what is left behind is noticed


def test_a_decoding_pass(mode: FakeTensorMode) -> None:
    """Fake tensors also refuse what makes the host wait: their shapes and values can't be asked for."""
    vla = moved(fake_vla(shallow(TINY), Precision(lora_rank=0), mode), mode).eval().requires_grad_(False)
    with mode, torch.inference_mode():
        ids, pixels = inputs("cuda")
        lengths = torch.full((BATCH,), WORDS, device="cuda")
        length = TINY.num_images_in_input * TINY.num_patches + WORDS + 1 + ACTIONS - 1
        layers = empty_cache(vla.config.text_config, BATCH, length, like=vla.language_model.model.norm.weight)
        first, _, ends = prefill(vla, layers, ids, lengths, pixels)
        following, margins = verify(vla, layers, first.expand(-1, ACTIONS - 1), ends)
    assert following.shape == margins.shape == (BATCH, ACTIONS - 1)
    assert {tensor.device.type for tensor in (first, following, margins)} == {"cuda"}
