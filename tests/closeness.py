"""How far ours is from the original's arrays: the tables of docs/parity.md, and what test_closeness.py holds against the tolerances.

OPENVLA_REFERENCE=FOLDER OPENVLA_OFT_REFERENCE=FOLDER python -m tests.closeness      (without them: the excerpts in tests/reference*)
Names, sizes and counts come from the arrays. What has to be equal altogether, such as which parameters have a gradient, is asserted.
"""

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from action_tokenizer import ActionTokenizer
from prismatic import image, normalize
from prismatic.adapter import FILE_PREFIX, lora_state_dict, merge_lora
from prismatic.augmentation import Augmentation
from prismatic.checkpoint import load_vla
from prismatic.dataset_statistics import load_statistics
from prismatic.models.unused import unused_parameters
from prismatic.models.vision import patch_features
from prismatic.models.vla import VLA
from prismatic.normalize import normalize_state
from prismatic.processor import Processor, ProcessorConfig
from tests.conftest import SETS
from tests.original import MEANS, STDS, VARIANTS, Arrays, Seen, batch, cases, load_oft, oft_batch, oft_cases, oft_folder

CLEAR = 1e-3  # top-1 margin of a logit from which on the arg-max has to be the same


class Row(NamedTuple):
    what: str
    difference: float  # the largest; of things that are right or wrong, how many are wrong
    tolerance: float


def near(what: str, mine: Any, theirs: Any, tolerance: float) -> Row:
    mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    assert mine.shape == theirs.shape, f"{what}: {mine.shape}, not {theirs.shape}"
    return Row(what, float(np.abs(mine - theirs).max()), tolerance)


def wrong(what: str, mine: Any, theirs: Any) -> Row:
    return Row(what, float((np.asarray(mine) != np.asarray(theirs)).sum()), 0)


def check(rows: Iterable[Row]) -> None:
    """Every difference is within its tolerance."""
    rows = [*rows]
    assert rows and not [row for row in rows if not row.difference <= row.tolerance]


def log_sums(logits: np.ndarray) -> np.ndarray:
    return np.log(np.exp(logits.astype(np.float64)).sum(-1))


def gradients(what: str, vla: VLA, names: Iterable[str], norms: np.ndarray, without: Iterable[str]) -> Row:
    """Of the gradients that a loss left: the largest relative difference of a norm. Which there are is asserted."""
    given = {p for p in vla.named_parameters() if p[1].requires_grad}
    mine = {name: p.grad.norm().item() for name, p in given if p.grad is not None}
    assert mine.keys() == {name.removeprefix(FILE_PREFIX) for name in names}
    lacking = {name for name, p in given if p.grad is None}
    assert lacking == {name.removeprefix(FILE_PREFIX) for name in without}
    if len(given) == len(list(vla.parameters())):
        assert lacking == {*unused_parameters(vla)}  # several processes leave them out
    least = 1e-6 * norms.max()
    pairs = zip((mine[name.removeprefix(FILE_PREFIX)] for name in names), norms.tolist(), strict=True)
    relative = max(abs(one - other) / max(other, least) for one, other in pairs)
    return Row(f"{what}gradient norm of each of {len(mine)} parameters, relative", relative, 1e-3)


def trained(vla: VLA, inputs: dict[str, Any], losses: np.ndarray, norms: np.ndarray, loose: float) -> Iterator[Row]:
    """Eight steps of AdamW; vla holds the result."""
    parameters, mine = [p for p in vla.train().parameters() if p.requires_grad], []
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.01)
    for _ in losses:
        loss = vla(**inputs).loss
        assert loss is not None
        loss.backward()
        total = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()
        mine.append((loss.item(), total.item()))
        optimizer.step()
        optimizer.zero_grad()
    yield near("losses of 8 steps of AdamW on it", [loss for loss, _ in mine], losses, 2e-4 * loose)
    ratios = [norm / other for (_, norm), other in zip(mine, norms.tolist(), strict=True)]
    yield near("their gradient norms, relative", ratios, np.ones(len(ratios)), 1e-3 * loose)


def model(folder: Path) -> Iterator[Row]:
    arrays, inputs, vla = np.load(folder / "forward.npz"), batch(folder), load_vla(folder / "checkpoint")
    towers, seen, valid = vla.vision_backbone, inputs["pixel_values"], arrays["valid_mask"]
    action = slice(vla.tokenizer.first_id, vla.config.vocab_size)
    with torch.inference_mode():
        dino = patch_features(towers.featurizer, seen[:, :3])
        yield near("DINOv2 patch features", dino, arrays["dino_patches"], 1e-4)
        siglip = patch_features(towers.fused_featurizer, seen[:, 3:])
        yield near("SigLIP patch features", siglip, arrays["siglip_patches"], 1e-4)
        yield near("projector", vla.projector(towers(seen)), arrays["projector_features"], 5e-5)
        out = vla(**inputs, all_logits=True)
    assert out.loss is not None and out.logits is not None
    logits = out.logits.numpy()
    yield near("logits of the action tokens", logits[..., action][valid], arrays["logits_action"][valid], 3e-4)
    yield near("log of the sum of all logits", log_sums(logits)[valid], arrays["logits_logsumexp"][valid], 1e-4)
    two = np.sort(logits, axis=-1)[..., -2:]
    clear = valid & (two[..., 1] - two[..., 0] > CLEAR)
    yield wrong("wrong arg-max of a clear logit", logits.argmax(-1)[clear], arrays["logits_argmax"][clear])
    if "logits_last9_full_seq0" in arrays:
        places = arrays["logits_last9_positions"]
        yield near("logits of all tokens", logits[0, places[0]], arrays["logits_last9_full_seq0"], 3e-4)
    yield near("loss (against float64)", out.loss.item(), arrays["loss_float64"], 1e-4)
    vla(**inputs).loss.backward()
    yield gradients("", vla, *(arrays[name] for name in ("grad_names", "grad_norms", "no_grad_names")))
    yield from decoded(folder, vla.eval())


def decoded(folder: Path, vla: VLA) -> Iterator[Row]:
    """predict_action, of each case alone and of all in a padded batch."""
    answers, statistics, rows = np.load(folder / "generate.npz"), load_statistics(folder / "checkpoint"), cases(folder)
    tokenizer, found, actions = ActionTokenizer(), [], []
    for case, pixels in rows:
        prompt = torch.tensor([case["processor_input_ids"]])
        ids = vla.generate_action_ids(prompt, pixels[None], len(case["generated_ids"]))[0].numpy()
        found.append(ids)
        actions.append(normalize.unnormalize(tokenizer.decode(ids), statistics[case["unnorm_key"]]["action"]))

    def recorded(name: str) -> np.ndarray:
        return np.concatenate([answers[f"{name}_{number}"] for number in range(len(rows))])

    mine = np.concatenate(found)
    yield wrong(f"wrong action ids in {len(rows)} cases of predict_action", mine, recorded("generated_ids"))
    yield near("their actions, un-normalised", np.concatenate(actions), recorded("action"), 1e-9)
    width, pad = max(len(case["processor_input_ids"]) for case, _ in rows) + 3, vla.config.pad_token_id
    padded = torch.tensor([(case["processor_input_ids"] + [pad] * width)[:width] for case, _ in rows])
    together = vla.generate_action_ids(padded, torch.stack([pixels for _, pixels in rows]), 7, padded != pad)
    expected = [case["generated_ids"][:7] for case, _ in rows]
    yield wrong("wrong action ids in a padded batch of them", together, expected)


def adapter(folder: Path) -> Iterator[Row]:
    """An adapter of the original's, then merged; and after eight more steps of training."""
    lora, inputs = np.load(folder / "lora.npz"), batch(folder)
    places = torch.from_numpy(np.load(folder / "forward.npz")["logits_last9_positions"])
    vla = load_vla(folder / "checkpoint", folder / "lora_adapter")
    names = {*load_vla(folder / "checkpoint").state_dict()}
    for what, key in (("with an adapter of the original", ""), ("with the adapter merged", "_merged")):
        with torch.inference_mode():
            out = (merge_lora(vla) if key else vla)(**inputs, all_logits=True)
        rows = torch.stack([row[place] for row, place in zip(out.logits, places, strict=True)])
        logits = rows[..., vla.tokenizer.first_id : vla.config.vocab_size]
        yield near(f"logits {what}", logits, lora[f"logits{key}_last9_action"], 3e-4)
        yield near(f"loss {what}", out.loss.item(), lora["loss_merged" if key else "loss_adapter"], 2e-4)
    assert {*vla.state_dict()} == names
    vla = load_vla(folder / "checkpoint", folder / "lora_adapter")
    yield from trained(vla, inputs, lora["train_losses"], lora["train_grad_norms"], 1)
    state, differences = lora_state_dict(vla), []
    for key, expected in np.load(folder / "lora_after_8_steps.npz").items():
        name, _, rows = key.partition("@")  # some are cut: rows31744:32000, rows::16
        bounds = slice(*(int(part) if part else None for part in rows.removeprefix("rows").split(":")))
        differences.append(np.abs(state[name].detach().numpy()[bounds] - expected))
    yield Row("adapter after them", max(float(d.max()) for d in differences), 1e-4)
    yield Row("adapter after them, mean of a tensor", max(float(d.mean()) for d in differences), 1e-6)


def pixels(folder: Path) -> Iterator[Row]:
    arrays = np.load(folder / "image_path.npz")
    names = [str(name) for name in arrays["names"]]
    frames = {name: np.asarray(Image.open(folder / "images" / f"{name}.png").convert("RGB")) for name in names}
    resized = {name: image.resize_lanczos3(image.jpeg_round_trip(frame), 224) for name, frame in frames.items()}
    off = max(int((picture != arrays[f"{name}__resize_224"]).sum()) for name, picture in resized.items())
    yield Row("JPEG + Lanczos: values off by one, the worst image", off, 2)
    crops = [image.center_crop(arrays[f"{n}__resize_224"]) for n in names]
    yield wrong("centre crop: values that differ", crops, [arrays[f"{n}__center_crop_224"] for n in names])
    lut = arrays["pixel_value_lut"]
    expected = [np.stack([lut[c][picture[..., c % 3]] for c in range(6)]) for picture in crops]
    yield near("pixel_values", [image.normalize_pixels(picture, MEANS, STDS) for picture in crops], expected, 1e-6)
    given, share = np.load(folder / "augment.npz"), 0.0
    for i, name in enumerate(given["names"]):
        y1, x1, y2, x2 = given[f"{name}__crop_box"].tolist()
        names_of_the_rest = ("brightness_delta", "contrast_factor", "saturation_factor", "hue_delta")
        rest = (float(given[key][i]) for key in names_of_the_rest)
        mine = Augmentation((y1, x1, y2, x2), *rest)(arrays[f"{name}__resize_224"])
        share = max(share, float(np.mean(mine != given[f"{name}__out"])))
    yield Row("augmentation: share of values off by one", share, 1e-3)


def numbers(folder: Path) -> Iterator[Row]:
    arrays, tokenizer = np.load(folder / "action_tokenizer.npz"), ActionTokenizer()
    for width in ("64", "32"):
        known = ~np.isnan(arrays[f"value{width}"])
        mine = tokenizer.encode(arrays[f"value{width}"][known])
        ids = arrays[f"token_id_from_float{width}"]
        yield wrong(f"wrong ids of {int(known.sum())} float{width} action values at the bins' edges", mine, ids[known])
        yield wrong(
            f"wrong centres of float{width} values", tokenizer.decode(ids), arrays[f"decoded_from_float{width}"]
        )
    yield wrong("wrong centres of all ids", tokenizer.decode(arrays["all_ids"]), arrays["decoded_of_all_ids"])
    given = np.load(folder / "rlds_pipeline.npz")
    (entry,) = json.loads((folder / "rlds_dataset_statistics.json").read_text()).values()
    said = json.loads((folder / "rlds_pipeline.json").read_text())["episode_instructions_in_order"]
    kept = given["raw_action"][np.repeat([text != "" for text in said], given["episode_lengths"])]
    mine = normalize.normalize(normalize.gripper_open_is_one(kept), entry["action"])
    yield near("normalised actions of the RLDS set", mine, given["train_action"], 0)


def named(arrays: Arrays, before: str = "", after: str = "") -> Arrays:
    """Those whose names begin and end so, without it."""
    found = (name for name in arrays if name.startswith(before) and name.endswith(after))
    return {name.removeprefix(before).removesuffix(after): arrays[name] for name in found}


def oft(folders: tuple[Path, Path], place: Path) -> Iterator[Row]:
    """OpenVLA-OFT in training form, in its four variants: (regression, discrete) × (one image, two images and the robot's state)."""
    arrays = dict(np.load(folders[1] / "train.npz"))
    for variant, (kind, images, state) in VARIANTS.items():
        name = f"{kind}, {images} image{'s' * (images > 1)}{' and state' * state}: "
        of = named(arrays, after=f"_{variant}")
        for row in variant_rows(load_oft(folders, place / variant, variant), oft_batch(arrays, variant), of):
            yield row._replace(what=name + row.what)


def variant_rows(vla: VLA, inputs: dict[str, Any], of: Arrays) -> Iterator[Row]:
    seen = Seen(vla)
    out = vla(**inputs)
    assert out.loss is not None and out.actions is not None
    out.loss.backward()
    actions, target, visible = out.actions.detach().numpy(), inputs["actions"].numpy(), of["key_visible"]
    blank = torch.take_along_dim(seen.embeddings, torch.from_numpy(of["zeroed_position"])[..., None], dim=1)
    assert seen.last.shape[1] == visible.shape[1] and (blank == 0).all()
    if "inputs_embeds" in of:
        yield near("embeddings", seen.embeddings[visible], of["inputs_embeds"][visible], 5e-5)
        yield near("last hidden states", seen.last[visible], of["last_hidden_states"][visible], 2e-4)
    if vla.action_head is not None:
        yield near("hidden states that the head reads", seen.into_head, of["actions_hidden_states"], 2e-4)
        yield near("actions", actions, of["predicted_actions"], 2e-4)
    else:
        assert out.logits is not None
        logits = out.logits.detach().view(len(target), -1, out.logits.shape[-1]).numpy()  # (B, 57, rows of the head)
        yield near("logit of the end token", logits[:, -1, vla.config.eos_token_id], of["stop_logit"], 5e-4)
        yield near("log of the sum of all logits", log_sums(logits), of["logsumexp57"], 2e-4)
        with torch.inference_mode():
            at = torch.from_numpy(of["action_position"])[..., None]
            mine = vla.language_model.lm_head(torch.take_along_dim(seen.last, at, dim=1))
        mine = mine[..., vla.tokenizer.first_id : vla.config.vocab_size]
        yield near("logits of the action tokens", mine, of["logits_action"], 5e-4)
        clear = of["top1_minus_top2"].reshape(actions.shape) > CLEAR
        ids = logits[:, :-1].argmax(-1).reshape(actions.shape)
        yield wrong("ids that differ", ids[clear], of["predicted_ids"][clear])
        yield near("actions", actions[clear], of["decoded_actions"][clear], 1e-6)
        target = vla.tokenizer.decode(vla.tokenizer.encode(target))  # bin centres are compared
    yield near("loss (against float64)", out.loss.item(), of["loss_float64"], 1e-4)
    distance = np.abs(actions - target)
    yield near("L1 of the current action", distance[:, 0].mean(), of["metric_curr_action_l1_loss"], 1e-4)
    yield near("L1 of the next actions", distance[:, 1:].mean(), of["metric_next_actions_l1_loss"], 1e-4)
    yield gradients("", vla, of["grad_names"], of["grad_norms"], of["no_grad_names"])


def oft_adapter(folders: tuple[Path, Path], place: Path) -> Iterator[Row]:
    """Variant b with the original's adapter beside whole heads, then merged; and after eight steps of training."""
    arrays = dict(np.load(folders[1] / "train.npz"))
    of = named(arrays, "lora_", "_b")
    inputs, lora = oft_batch(arrays, "b"), folders[0] / "lora_adapter"
    vla = load_oft(folders, place / "once", "b", adapter=lora).train()
    assert sum(p.numel() for p in vla.parameters() if p.requires_grad) == int(of["n_trainable"])
    seen, out = Seen(vla), vla(**inputs)
    out.loss.backward()
    yield near("loss with an adapter", out.loss.item(), of["loss"], 2e-4)
    yield near("hidden states with an adapter", seen.into_head, of["actions_hidden_states"], 2e-4)
    yield near("actions with an adapter", out.actions.detach(), of["predicted_actions"], 2e-4)
    yield gradients("with an adapter: ", vla, of["grad_names"], of["grad_norms"], of["no_grad_names"])
    with torch.inference_mode():
        merged = merge_lora(vla)(**inputs)
    yield near("loss with the adapter merged", merged.loss.item(), of["merged_loss"], 2e-4)
    yield near("hidden states with the adapter merged", seen.into_head, of["merged_actions_hidden_states"], 2e-4)
    vla = load_oft(folders, place / "again", "b", adapter=lora)
    yield from trained(vla, inputs, of["train_losses"], of["train_grad_norms"], 2)
    state, after = vla.state_dict(), named(arrays, "after8_")
    assert after.keys() == {name for name in state if name.startswith(("action_head.", "proprio_projector."))}
    largest = max(np.abs(state[name].numpy() - expected).max() for name, expected in after.items())
    yield Row("head and projector after them", float(largest), 1e-4)


def predicted(folders: tuple[Path, Path], place: Path) -> Iterator[Row]:
    """From the prompt alone, one by one and in right-padded batches; then states and actions in the data set's units."""
    arrays = dict(np.load(folders[1] / "predict.npz"))

    def kind(case: dict[str, Any]) -> tuple[str, int, bool]:
        return "l1" if case["head"] == "l1" else "parallel", case["num_images"], case["use_proprio"]

    groups = [(key, [*group]) for key, group in itertools.groupby(sorted(oft_cases(folders), key=kind), key=kind)]
    assert len(groups) >= 2
    for number, ((head, images, state), group) in enumerate(groups):
        folder = oft_folder(folders, place / str(number), head=head == "l1", state=state)
        yield from chunks(load_vla(folder, action_head=head, num_images_in_input=images).eval(), group, arrays)
    statistics = load_statistics(folders[1])
    for case in json.loads((folders[1] / "predict.json").read_text())["cases"]:
        number, key, loose = case["case"], case["unnorm_key"], 1e-6 if case["head"] == "l1" else 1e-9
        config = ProcessorConfig(key, True, action_head="l1", num_actions_chunk=8, proprio_dim=8)
        mine = Processor(config, None, statistics).unnormalize(arrays[f"normalized_actions_{number}"])  # type: ignore[arg-type]
        yield near(f"case {number}: actions, un-normalised", mine, arrays[f"actions_{number}"], loose)
        if case["use_proprio"]:
            proprio = statistics[key]["proprio"]
            constant = np.equal(proprio["min"], proprio["max"])  # -1 or 1 in the original, 0 when it learns and here
            state = normalize_state(arrays[f"state_{number}"], proprio)
            assert (state[constant] == 0).all()
            yield near(f"case {number}: state", state[~constant], arrays[f"proprio_{number}"][~constant], 1e-12)


def chunks(vla: VLA, group: list[dict[str, Any]], arrays: Arrays) -> Iterator[Row]:
    pad, prompts = vla.config.pad_token_id, [case["processor_input_ids"] for case in group]
    width = max(map(len, prompts)) + 2
    ids = torch.tensor([(prompt + [pad] * width)[:width] for prompt in prompts])
    images = torch.from_numpy(np.stack([case["pixel_values"] for case in group]))
    states = None
    if group[0]["use_proprio"]:
        states = torch.from_numpy(np.stack([arrays[f"proprio_{case['case']}"] for case in group])).float()
    together, seen = vla.predict_chunk(ids, images, states, ids != pad), Seen(vla)
    for row, (case, prompt) in enumerate(zip(group, prompts, strict=True)):
        number, one = case["case"], slice(row, row + 1)
        assert hashlib.sha256(case["pixel_values"].tobytes()).hexdigest() == case["pixel_values_sha256"], number
        inputs = (ids[one, : len(prompt)], images[one], None if states is None else states[one])
        alone = vla.predict_chunk(*inputs)
        assert seen.last.shape[1] == case["sequence_length"]
        first, hidden = case["first_hidden_state"], arrays[f"actions_hidden_states_{number}"]
        yield near(f"case {number}: hidden states", seen.last[0, first : first + len(hidden)], hidden, 2e-4)
        expected = arrays[f"normalized_actions_{number}"]
        clear = np.ones(expected.shape, bool)
        if vla.action_head is None:
            clear = arrays[f"top1_minus_top2_{number}"].reshape(expected.shape) > CLEAR
        for what, mine in (("alone", alone[0]), ("in a batch", together[row])):
            yield near(f"case {number}: actions, {what}", mine.numpy()[clear], expected[clear], 2e-4)


def show(rows: Iterable[Row]) -> None:
    print("| item | largest difference | tolerance |\n|---|---|---|")
    for what, difference, tolerance in rows:
        print(f"| {what} | {difference:.1e} | {tolerance:g} |".replace("0.0e+00", "0"), flush=True)


if __name__ == "__main__":
    show(row for part in (model, adapter, pixels, numbers) for row in part(SETS[0]))
    print("\nOpenVLA-OFT\n")
    with tempfile.TemporaryDirectory() as place:
        parts = (oft, oft_adapter, predicted)
        show(row for part in parts for row in part(SETS, Path(place) / part.__name__))
