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
from prismatic.adapter import merge_lora
from prismatic.augmentation import Augmentation
from prismatic.checkpoint import load_vla
from prismatic.dataset_statistics import load_statistics
from prismatic.models.vision import patch_features
from prismatic.models.vla import VLA
from tests import original_oft
from tests.conftest import EXCERPT, FULL, OFT_EXCERPT, OFT_FULL
from tests.original import MEANS, STDS, cases, last_nine

Row = tuple[str, str, str]  # what, largest difference, tolerance


def near(what: str, mine: object, theirs: object, tolerance: str) -> Row:
    return what, f"{np.abs(np.asarray(mine, np.float64) - np.asarray(theirs, np.float64)).max():.1e}", tolerance


def gradients(what: str, vla: VLA, names: np.ndarray, norms: np.ndarray) -> Row:
    """Of the gradients that a loss left: the largest relative difference of a norm."""
    mine = {name: p.grad.norm().item() for name, p in vla.named_parameters() if p.grad is not None}
    given = zip(names.tolist(), norms.tolist(), strict=True)
    relative = max(abs(mine[name] - norm) / norm for name, norm in given if norm > 1e-6)
    return f"{what}gradient norm of each of {len(mine)} parameters, relative", f"{relative:.1e}", "1e-3"


def model(folder: Path) -> Iterator[Row]:
    arrays, lora = np.load(folder / "forward.npz"), np.load(folder / "lora.npz")
    batch = {name: torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask", "pixel_values", "labels")}
    seen = batch["pixel_values"] = batch["pixel_values"].float()
    vla = load_vla(folder / "checkpoint")
    towers, valid = vla.vision_backbone, arrays["valid_mask"]
    with torch.inference_mode():
        dino, siglip = (
            patch_features(towers.featurizer, seen[:, :3]),
            patch_features(towers.fused_featurizer, seen[:, 3:]),
        )
        yield near("DINOv2 patch features", dino, arrays["dino_patches"], "1e-4")
        yield near("SigLIP patch features", siglip, arrays["siglip_patches"], "1e-4")
        yield near("projector", vla.projector(towers(seen)), arrays["projector_features"], "5e-5")
        out = vla(**batch, all_logits=True)
    logits = out.logits.numpy()[..., 31744:32000][valid]
    yield near("logits of the action tokens", logits, arrays["logits_action"][valid], "3e-4")
    yield near("loss (against float64)", out.loss.item(), arrays["loss_float64"], "1e-4")
    vla(**batch).loss.backward()
    yield gradients("", vla, arrays["grad_names"], arrays["grad_norms"])
    adapted = load_vla(folder / "checkpoint", folder / "lora_adapter")
    logits = last_nine(adapted, batch, folder)[1]
    yield near("logits with an adapter of the original", logits, lora["logits_last9_action"], "3e-4")
    logits = last_nine(merge_lora(adapted), batch, folder)[1]
    yield near("the same, merged", logits, lora["logits_merged_last9_action"], "3e-4")
    answers, expected = np.load(folder / "generate.npz"), cases(folder)
    statistics, wrong, off = load_statistics(folder / "checkpoint"), 0, 0.0
    for number, (case, pixels) in enumerate(expected):
        prompt = torch.tensor([case["processor_input_ids"]])
        ids = vla.generate_action_ids(prompt, pixels[None], len(case["generated_ids"]))[0].numpy()
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
    yield near("pixel_values", [image.normalize_pixels(picture, MEANS, STDS) for picture in crop], expected, "1e-6")
    given, share = np.load(folder / "augment.npz"), 0.0
    for i, name in enumerate(given["names"]):
        y1, x1, y2, x2 = given[f"{name}__crop_box"].tolist()
        names_of_the_rest = ("brightness_delta", "contrast_factor", "saturation_factor", "hue_delta")
        rest = (float(given[key][i]) for key in names_of_the_rest)
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
    yield near("normalised actions of the RLDS set", mine, given["train_action"], "0")


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
        of = {key.removesuffix(f"_{variant}"): array for key, array in arrays.items() if key.endswith(f"_{variant}")}
        if kind == "l1":
            yield near(f"{name}: hidden states", seen.into_head, of["actions_hidden_states"], "2e-4")
            yield near(f"{name}: actions", out.actions.detach(), of["predicted_actions"], "2e-4")
        else:
            at = torch.from_numpy(of["action_position"])[..., None]
            with torch.inference_mode():
                logits = vla.language_model.lm_head(torch.take_along_dim(seen.last, at, dim=1))
            logits = logits[..., vla.tokenizer.first_id : vla.tokenizer.vocab_size]
            yield near(f"{name}: logits of the action tokens", logits, of["logits_action"], "5e-4")
            wrong = int((np.abs(out.actions.numpy() - of["decoded_actions"]) > 1e-6).sum())
            yield f"{name}: actions that differ", str(wrong), "0"
        yield near(f"{name}: loss (against float64)", out.loss.item(), of["loss_float64"], "1e-4")
        yield gradients(f"{name}: ", vla, of["grad_names"], of["grad_norms"])


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
