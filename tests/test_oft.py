"""OpenVLA-OFT against the original's own numbers (closeness.py), how sharp that comparison is, and names and shapes at full size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from prismatic.models.lora import add_lora
from prismatic.models.vla import VLA, VLAConfig
from tests import closeness
from tests.conftest import OFT_EXCERPT
from tests.original import load_oft, oft_batch


@pytest.mark.parametrize(
    "part", [closeness.oft, closeness.oft_adapter, closeness.predicted], ids=lambda part: part.__name__
)
def test_every_difference_is_within_its_tolerance(
    both_numbers: tuple[Path, Path], part: Callable, tmp_path: Path
) -> None:
    closeness.check(part(both_numbers, tmp_path))


def test_full_size_has_the_originals_names_and_shapes() -> None:
    rows = [line.split("\t") for line in (OFT_EXCERPT / "oft7b_keys.tsv").read_text().splitlines()[1:]]
    published = {f"{part}.{name}": tuple(int(n) for n in shape.split("x")) for part, name, shape in rows}
    with torch.device("meta"):
        vla = VLA(VLAConfig(action_head="l1", num_actions_chunk=8, num_images_in_input=2, proprio_dim=8))
    ours = {name: tuple(tensor.shape) for name, tensor in vla.state_dict().items()}
    assert {name: ours[name] for name in ours if name.startswith(("action_head.", "proprio_projector."))} == published
    assert vla.action_head is not None and vla.proprio_projector is not None
    assert sum(p.numel() for p in vla.action_head.parameters()) == 151_117_831
    assert sum(p.numel() for p in vla.proprio_projector.parameters()) == 16_818_176
    assert sum(p.numel() for p in vla.parameters()) == 7_709_173_191
    adapted = add_lora(vla, rank=32)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 278_764_295


def test_each_mistake_is_seen(both_numbers: tuple[Path, Path], tmp_path: Path) -> None:
    """What the original's users suffer from moves the predictions by far more than the tolerance allows."""
    arrays = dict(np.load(both_numbers[1] / "train.npz"))
    vla, right = load_oft(both_numbers, tmp_path, "b"), oft_batch(arrays, "b")

    def distance(**wrong: Any) -> float:
        with torch.inference_mode():
            return (vla(**right | wrong).actions - torch.from_numpy(arrays["predicted_actions_b"])).abs().max().item()

    def shifted(module: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return args[0], torch.where(args[1] > vla.config.num_patches * 2, args[1] - 1, args[1])

    pixels = right["pixel_values"]
    assert distance() < 2e-4
    mistakes = {
        "padding": distance(attention_mask=torch.ones(right["input_ids"].shape, dtype=torch.bool)),
        "order of images": distance(pixel_values=pixels.roll(pixels.shape[1] // 2, dims=1)),
    }
    hook = vla.language_model.register_forward_pre_hook(shifted)
    mistakes["positions"] = distance()
    hook.remove()
    for layer in vla.language_model.model.layers:
        cast(Any, layer).self_attn.causal = True
    mistakes["causal"] = distance(attention_mask=None)
    assert min(mistakes.values()) > 20 * 2e-4, mistakes
