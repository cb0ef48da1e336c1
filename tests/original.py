"""The original's recorded inputs, and how ours are given them: OpenVLA's set, and OpenVLA-OFT's, whose base model is the former's checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from prismatic import image
from prismatic.checkpoint import load_vla
from prismatic.image import resize_bicubic
from prismatic.models.vla import VLA
from prismatic.processor import DINO_MEAN, DINO_STD, SIGLIP_MEAN, SIGLIP_STD

MEANS, STDS = np.array([DINO_MEAN, SIGLIP_MEAN]), np.array([DINO_STD, SIGLIP_STD])
Arrays = dict[str, np.ndarray]
VARIANTS = {
    "a": ("l1", 1, False),
    "b": ("l1", 2, True),
    "c": ("parallel", 1, False),
    "d": ("parallel", 2, True),
}  # of OFT


def batch(folder: Path) -> dict[str, torch.Tensor]:
    """The right-padded batch of three of forward.npz, as VLA.forward takes it."""
    arrays = np.load(folder / "forward.npz")
    names = ("input_ids", "attention_mask", "labels")
    pixels = torch.from_numpy(arrays["pixel_values"]).float()
    return {name: torch.from_numpy(arrays[name]) for name in names} | {"pixel_values": pixels}


def cases(folder: Path) -> list[tuple[dict, torch.Tensor]]:
    """Each case of generate.json with its pixel_values (6, 224, 224)."""
    found = []
    for case in json.loads((folder / "generate.json").read_text()):
        if case.get("image_key"):
            frame = np.load(folder / "image_path.npz")[case["image_key"]]
        else:
            frame = np.asarray(Image.open(folder / case["image_file"]).convert("RGB"))
        found.append((case, torch.from_numpy(image.normalize_pixels(resize_bicubic(frame, 224), MEANS, STDS))))
    return found


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


def load_oft(numbers: tuple[Path, Path], place: Path, variant: str, **how: Any) -> VLA:
    kind, images, state = VARIANTS[variant]
    folder = oft_folder(numbers, place, head=kind == "l1", state=state)
    chunk = np.load(numbers[1] / "train.npz")["actions"].shape[1]  # no published folder says it
    return load_vla(folder, action_head=kind, num_actions_chunk=chunk, num_images_in_input=images, **how)


def oft_batch(arrays: Arrays, variant: str) -> dict[str, Any]:
    """The recorded batch as VLA.forward takes it in a variant. Channel c of a tower's pixels is lut[c] of the image's channel c % 3."""
    _, images, state = VARIANTS[variant]
    lut, views = arrays["pixel_value_lut"], [arrays[f"images_{name}"] for name in ("primary", "wrist")[:images]]
    pixels = [np.stack([lut[c][view[..., c % 3]] for c in range(len(lut))], axis=1) for view in views]
    return {
        **{name: torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask", "labels", "actions")},
        "pixel_values": torch.from_numpy(np.concatenate(pixels, axis=1)),
        "proprio": torch.from_numpy(arrays["proprio"]) if state else None,
    }


def oft_cases(numbers: tuple[Path, Path]) -> list[dict[str, Any]]:
    """The cases of predict.json whose images are there, with their pixel_values."""
    base, oft = numbers
    stored, found = np.load(base / "image_path.npz"), []
    for case in json.loads((oft / "predict.json").read_text())["cases"]:
        keys = (case["full_image"], case["wrist_image"])[: case["num_images"]]
        keys = [
            key if key.endswith("__resize_224") else f"{key}__resize_224" for key in keys
        ]  # raw images are resized first
        if all(key in stored for key in keys):
            images = [image.center_crop(stored[key]) if case["center_crop"] else stored[key] for key in keys]
            case["pixel_values"] = np.concatenate([image.normalize_pixels(frame, MEANS, STDS) for frame in images])
            found.append(case)
    return found


class Seen:
    """What enters the first layer, leaves the final norm and enters the action head during a call."""

    def __init__(self, vla: VLA) -> None:
        self.embeddings = self.last = self.into_head = torch.empty(0)
        model = vla.language_model.model
        model.layers[0].register_forward_pre_hook(lambda module, args: setattr(self, "embeddings", args[0].detach()))
        model.norm.register_forward_hook(lambda module, args, out: setattr(self, "last", out.detach()))
        if vla.action_head is not None:
            vla.action_head.register_forward_pre_hook(lambda module, args: setattr(self, "into_head", args[0].detach()))
