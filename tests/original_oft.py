"""OpenVLA-OFT's recorded batch and folders, for its tests and closeness.py: the base is the plain OpenVLA set's, the heads are the OFT set's."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prismatic.checkpoint import load_vla
from prismatic.models.vla import VLA

Arrays = dict[str, np.ndarray]
VARIANTS = {"a": ("l1", 1, False), "b": ("l1", 2, True), "c": ("parallel", 1, False), "d": ("parallel", 2, True)}


def oft_folder(numbers: tuple[Path, Path], place: Path, *, head: bool, state: bool) -> Path:
    """An OpenVLA-OFT folder as the original saves it: the base's weights with the files of the heads beside them."""
    base, oft = numbers
    folder = place / f"oft-{head}-{state}"
    shutil.copytree(base / "checkpoint", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    for part in ["action_head"] * head + ["proprio_projector"] * state:
        (published,) = oft.glob(f"{part}--*_checkpoint.pt")
        shutil.copyfile(published, folder / published.name)
    shutil.copyfile(oft / "dataset_statistics.json", folder / "dataset_statistics.json")
    return folder


def load(numbers: tuple[Path, Path], place: Path, variant: str, **how: Any) -> VLA:
    kind, images, state = VARIANTS[variant]
    folder = oft_folder(numbers, place, head=kind == "l1", state=state)
    chunk = np.load(numbers[1] / "train.npz")["actions"].shape[1]  # no published folder says it
    return load_vla(folder, action_head=kind, num_actions_chunk=chunk, num_images_in_input=images, **how)


def pixels(images: np.ndarray, lut: np.ndarray) -> torch.Tensor:
    """(B, S, S, 3) uint8 → (B, 6, S, S) float32, as the set says: channel c is lut[c] of the image's channel c % 3."""
    return torch.from_numpy(np.stack([lut[c][images[..., c % 3]] for c in range(len(lut))], axis=1))


def batch(arrays: Arrays, variant: str) -> dict[str, Any]:
    """The recorded batch as VLA.forward takes it in a variant."""
    _, images, state = VARIANTS[variant]
    cameras = ("images_primary", "images_wrist")[:images]
    return {
        **{name: torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask", "labels", "actions")},
        "pixel_values": torch.cat([pixels(arrays[name], arrays["pixel_value_lut"]) for name in cameras], dim=1),
        "proprio": torch.from_numpy(arrays["proprio"]) if state else None,
    }


class Seen:
    """What enters the first layer, leaves the final norm and enters the action head during a call."""

    def __init__(self, vla: VLA) -> None:
        self.embeddings = self.last = self.into_head = torch.empty(0)
        model = vla.language_model.model
        model.layers[0].register_forward_pre_hook(lambda module, args: setattr(self, "embeddings", args[0].detach()))
        model.norm.register_forward_hook(lambda module, args, out: setattr(self, "last", out.detach()))
        if vla.action_head is not None:
            vla.action_head.register_forward_pre_hook(lambda module, args: setattr(self, "into_head", args[0].detach()))
