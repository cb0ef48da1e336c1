"""The table of docs/parity.md: largest differences from the original's arrays, printed as Markdown.

OPENVLA_REFERENCE=FOLDER OPENVLA_OFT_REFERENCE=FOLDER python -m tests.closeness      (without them: the excerpts in tests/reference*)
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from action_tokenizer import ActionTokenizer
from prismatic import image, normalize
from prismatic.augmentation import Augmentation
from prismatic.checkpoint import load_vla
from prismatic.dataset_statistics import load_statistics
from prismatic.models.lora_weights import merge_lora
from prismatic.models.vision import patch_features
from tests import original_oft
from tests.conftest import EXCERPT, FULL, OFT_EXCERPT, OFT_FULL
from tests.original import MEANS, STDS, cases, last_nine

Row = tuple[str, str, str]  # what, largest difference, tolerance


def largest(mine: object, theirs: object) -> str:
    return f"{np.abs(np.asarray(mine, np.float64) - np.asarray(theirs, np.float64)).max():.1e}"


def model(folder: Path) -> Iterator[Row]:
    arrays = np.load(folder / "forward.npz")
    batch = {name: torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask", "pixel_values", "labels")}
    batch["pixel_values"] = batch["pixel_values"].float()
    vla = load_vla(folder / "checkpoint")
    with torch.inference_mode():
        towers = (
            (vla.vision_backbone.featurizer, batch["pixel_values"][:, :3]),
            (vla.vision_backbone.fused_featurizer, batch["pixel_values"][:, 3:]),
        )
        yield "DINOv2 patch features", largest(patch_features(*towers[0]), arrays["dino_patches"]), "1e-4"
        yield "SigLIP patch features", largest(patch_features(*towers[1]), arrays["siglip_patches"]), "1e-4"
        yield (
            "projector",
            largest(vla.projector(vla.vision_backbone(batch["pixel_values"])), arrays["projector_features"]),
            "5e-5",
        )
        out = vla(**batch, all_logits=True)
    valid = arrays["valid_mask"]
    yield (
        "logits of the action tokens",
        largest(out.logits.numpy()[..., 31744:32000][valid], arrays["logits_action"][valid]),
        "3e-4",
    )
    assert out.loss is not None
    yield "loss (against float64)", largest(out.loss.item(), arrays["loss_float64"]), "1e-4"
    loss = vla(**batch).loss
    assert loss is not None
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in vla.named_parameters() if p.grad is not None}
    relative = max(
        abs(norms[name] - norm) / norm
        for name, norm in zip(arrays["grad_names"].tolist(), arrays["grad_norms"].tolist(), strict=True)
        if norm > 1e-6
    )
    yield f"gradient norm of each of {len(norms)} parameters, relative", f"{relative:.1e}", "1e-3"
    given = np.load(folder / "lora.npz")
    adapted = load_vla(folder / "checkpoint", folder / "lora_adapter")
    yield (
        "logits with an adapter of the original",
        largest(last_nine(adapted, batch, folder)[1], given["logits_last9_action"]),
        "3e-4",
    )
    yield (
        "the same, merged",
        largest(last_nine(merge_lora(adapted), batch, folder)[1], given["logits_merged_last9_action"]),
        "3e-4",
    )
    answers, expected = np.load(folder / "generate.npz"), cases(folder)
    statistics, wrong, off = load_statistics(folder / "checkpoint"), 0, 0.0
    for number, (case, pixels) in enumerate(expected):
        ids = vla.generate_action_ids(
            torch.tensor([case["processor_input_ids"]]), pixels[None], len(case["generated_ids"])
        )[0].numpy()
        wrong += int((ids != answers[f"generated_ids_{number}"]).sum())
        action = normalize.unnormalize(ActionTokenizer().decode(ids), statistics[case["unnorm_key"]]["action"])
        off = max(off, float(np.abs(action - answers[f"action_{number}"]).max()))
    yield f"wrong action ids in {len(expected)} cases of predict_action", str(wrong), "0"
    yield "their actions, un-normalised", f"{off:.1e}", "1e-9"


def pixels(folder: Path) -> Iterator[Row]:
    arrays = np.load(folder / "image_path.npz")
    names = [str(name) for name in arrays["names"]]
    frames = {name: np.asarray(Image.open(folder / "images" / f"{name}.png").convert("RGB")) for name in names}
    resized = [
        np.abs(image.resize_lanczos3(image.jpeg_round_trip(frames[n]), 224).astype(int) - arrays[f"{n}__resize_224"])
        for n in names
    ]
    yield "JPEG + Lanczos: values off by one, the worst image", str(max(int((d > 0).sum()) for d in resized)), "2"
    crops = [
        np.abs(image.center_crop(arrays[f"{n}__resize_224"]).astype(int) - arrays[f"{n}__center_crop_224"])
        for n in names
    ]
    yield "centre crop: values that differ", str(sum(int((d > 0).sum()) for d in crops)), "0"
    lut = arrays["pixel_value_lut"]
    crop = [arrays[f"{n}__center_crop_224"] for n in names]
    expected = [np.stack([lut[c][picture[..., c % 3]] for c in range(6)]) for picture in crop]
    yield (
        "pixel_values",
        max(largest(image.normalize_pixels(p, MEANS, STDS), e) for p, e in zip(crop, expected, strict=True)),
        "1e-6",
    )
    given, share = np.load(folder / "augment.npz"), 0.0
    for i, name in enumerate(given["names"]):
        y1, x1, y2, x2 = given[f"{name}__crop_box"].tolist()
        rest = (
            float(given[key][i]) for key in ("brightness_delta", "contrast_factor", "saturation_factor", "hue_delta")
        )
        mine = Augmentation((y1, x1, y2, x2), *rest)(arrays[f"{name}__resize_224"])
        share = max(share, float(np.mean(mine != given[f"{name}__out"])))
    yield "augmentation: share of values off by one", f"{share:.1e}", "1e-3"


def numbers(folder: Path) -> Iterator[Row]:
    arrays, tokenizer = np.load(folder / "action_tokenizer.npz"), ActionTokenizer()
    known = ~np.isnan(arrays["value64"])
    wrong = int((tokenizer.encode(arrays["value64"][known]) != arrays["token_id_from_float64"][known]).sum())
    yield f"wrong ids of {int(known.sum())} action values at the bins' edges", str(wrong), "0"
    given = np.load(folder / "rlds_pipeline.npz")
    (entry,) = json.loads((folder / "rlds_dataset_statistics.json").read_text()).values()
    said = json.loads((folder / "rlds_pipeline.json").read_text())["episode_instructions_in_order"]
    kept = given["raw_action"][np.repeat([text != "" for text in said], given["episode_lengths"])]
    mine = normalize.normalize(normalize.gripper_open_is_one(kept), entry["action"])
    yield "normalised actions of the RLDS set", largest(mine, given["train_action"]), "0"


def oft(folders: tuple[Path, Path], place: Path) -> Iterator[Row]:
    """OpenVLA-OFT in its four variants: (regression, discrete) × (one image, two images and the robot's state)."""
    arrays = dict(np.load(folders[1] / "train.npz"))
    for variant, (kind, images, state) in original_oft.VARIANTS.items():
        name = f"{kind}, {images} image{'s' * (images > 1)}{' and state' * state}"
        vla = original_oft.load(folders, place / variant, variant)
        seen = original_oft.Seen(vla)
        out = vla(**original_oft.batch(arrays, variant))
        assert out.loss is not None and out.actions is not None
        out.loss.backward()
        if kind == "l1":
            yield f"{name}: hidden states", largest(seen.into_head, arrays[f"actions_hidden_states_{variant}"]), "2e-4"
            yield f"{name}: actions", largest(out.actions.detach(), arrays[f"predicted_actions_{variant}"]), "2e-4"
        else:
            at = torch.from_numpy(arrays[f"action_position_{variant}"])[..., None]
            with torch.inference_mode():
                logits = vla.language_model.lm_head(torch.take_along_dim(seen.last, at, dim=1))
            logits = logits[..., vla.tokenizer.first_id : vla.tokenizer.vocab_size]
            yield f"{name}: logits of the action tokens", largest(logits, arrays[f"logits_action_{variant}"]), "5e-4"
            wrong = int((np.abs(out.actions.numpy() - arrays[f"decoded_actions_{variant}"]) > 1e-6).sum())
            yield f"{name}: actions that differ", str(wrong), "0"
        yield f"{name}: loss (against float64)", largest(out.loss.item(), arrays[f"loss_float64_{variant}"]), "1e-4"
        given = zip(arrays[f"grad_names_{variant}"].tolist(), arrays[f"grad_norms_{variant}"].tolist(), strict=True)
        norms = {name: p.grad.norm().item() for name, p in vla.named_parameters() if p.grad is not None}
        relative = max(abs(norms[name] - norm) / norm for name, norm in given if norm > 1e-6)
        yield f"{name}: gradient norm of each of {len(norms)} parameters, relative", f"{relative:.1e}", "1e-3"


def show(rows: Iterable[Row]) -> None:
    print("| item | largest difference | tolerance |\n|---|---|---|")
    for what, difference, tolerance in rows:
        print(f"| {what} | {difference} | {tolerance} |", flush=True)


if __name__ == "__main__":
    whole = FULL.is_dir()
    source = FULL if whole else EXCERPT
    show(row for part in (model, pixels, numbers) for row in part(source))
    print("\nOpenVLA-OFT\n")
    with tempfile.TemporaryDirectory() as place:
        show(oft((source, OFT_FULL if whole and OFT_FULL.is_dir() else OFT_EXCERPT), Path(place)))
