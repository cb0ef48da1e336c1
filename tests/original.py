"""Inputs of the original's recorded cases, and ours asked the same way: what several tests and closeness.py compare."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prismatic import image
from prismatic.image import resize_bicubic
from prismatic.models.vla import VLA
from prismatic.processor import DINO_MEAN, DINO_STD, SIGLIP_MEAN, SIGLIP_STD

MEANS, STDS = np.array([DINO_MEAN, SIGLIP_MEAN]), np.array([DINO_STD, SIGLIP_STD])


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


def last_nine(vla: VLA, batch: dict[str, torch.Tensor], numbers: Path) -> tuple[float, np.ndarray]:
    """Loss, and the logits of the action ids at the last nine positions of each row (B, 9, 256)."""
    positions = torch.from_numpy(np.load(numbers / "forward.npz")["logits_last9_positions"])
    with torch.inference_mode():
        out = vla(**batch, all_logits=True)
    assert out.loss is not None
    last = vla.config.vocab_size
    rows = [row[place] for row, place in zip(out.logits, positions, strict=True)]
    return out.loss.item(), torch.stack(rows)[..., last - vla.config.n_action_bins : last].numpy()
