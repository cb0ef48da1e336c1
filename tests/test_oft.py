"""OpenVLA-OFT against the original's own numbers: the sequence, the mask, hidden states, actions, losses, gradients, eight steps of training.

Names, sizes and counts come from the reference set. The base model is the plain OpenVLA set's checkpoint, the heads are the OFT set's.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from prismatic import image
from prismatic.adapter import FILE_PREFIX, merge_lora
from prismatic.checkpoint import load_vla
from prismatic.dataset_statistics import load_statistics
from prismatic.models.decode import best_tokens
from prismatic.models.heads import HEADS
from prismatic.models.lora import add_lora
from prismatic.models.unused import unused_parameters
from prismatic.models.vla import VLA, VLAConfig, VLAOutput
from prismatic.normalize import normalize_state
from prismatic.processor import Processor, ProcessorConfig
from tests.conftest import OFT_EXCERPT
from tests.original_oft import VARIANTS, Arrays, Seen, batch, load, oft_folder


@pytest.fixture(scope="module")
def arrays(oft_numbers: Path) -> Arrays:
    return dict(np.load(oft_numbers / "train.npz"))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def vla(both_numbers: tuple[Path, Path], variant: str, tmp_path_factory: pytest.TempPathFactory) -> VLA:
    return load(both_numbers, tmp_path_factory.mktemp("oft"), variant)


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


def test_forward_in_training_form(vla: VLA, variant: str, arrays: Arrays) -> None:
    seen = Seen(vla)
    with torch.inference_mode():
        out = vla(**batch(arrays, variant))
    assert out.loss is not None and out.actions is not None
    assert abs(out.loss.item() - arrays[f"loss_{variant}"]) < 1e-4
    visible, positions = arrays[f"key_visible_{variant}"], arrays[f"action_position_{variant}"]
    assert seen.last.shape[1] == visible.shape[1]
    blank = torch.take_along_dim(seen.embeddings, torch.from_numpy(arrays[f"zeroed_position_{variant}"])[..., None], 1)
    assert (blank == 0).all()
    if f"inputs_embeds_{variant}" in arrays:
        np.testing.assert_allclose(seen.embeddings[visible], arrays[f"inputs_embeds_{variant}"][visible], atol=5e-5)
        np.testing.assert_allclose(seen.last[visible], arrays[f"last_hidden_states_{variant}"][visible], atol=2e-4)
    if VARIANTS[variant][0] == "l1":
        np.testing.assert_allclose(seen.into_head, arrays[f"actions_hidden_states_{variant}"], atol=2e-4)
        np.testing.assert_allclose(out.actions, arrays[f"predicted_actions_{variant}"], atol=2e-4)
        return
    check_discrete(vla, out, {name.removesuffix(f"_{variant}"): array for name, array in arrays.items()})
    hidden = torch.take_along_dim(seen.last, torch.from_numpy(positions)[..., None], dim=1)
    with torch.inference_mode():
        logits = vla.language_model.lm_head(hidden)[..., vla.tokenizer.first_id : vla.config.vocab_size]
    np.testing.assert_allclose(logits, arrays[f"logits_action_{variant}"], atol=5e-4)


def check_discrete(vla: VLA, out: VLAOutput, arrays: Arrays) -> None:
    assert out.logits is not None and out.actions is not None
    rows = len(arrays["stop_logit"])
    logits = out.logits.view(rows, -1, out.logits.shape[-1]).numpy()  # (B, 57, rows of the head)
    np.testing.assert_allclose(logits[:, -1, vla.config.eos_token_id], arrays["stop_logit"], atol=5e-4)
    np.testing.assert_allclose(
        np.log(np.exp(logits.astype(np.float64)).sum(-1)), arrays["logsumexp57"], atol=2e-4, rtol=0
    )
    clear = arrays["top1_minus_top2"].reshape(arrays["predicted_ids"].shape) > 1e-3
    ids = logits[:, :-1].argmax(-1).reshape(clear.shape)
    np.testing.assert_array_equal(ids[clear], arrays["predicted_ids"][clear])
    np.testing.assert_allclose(out.actions.numpy()[clear], arrays["decoded_actions"][clear], atol=1e-6)


def test_metrics_of_current_and_following_actions(vla: VLA, variant: str, arrays: Arrays) -> None:
    inputs = batch(arrays, variant)
    with torch.inference_mode():
        actions = vla(**inputs).actions
    assert actions is not None
    target = inputs["actions"].numpy()
    if VARIANTS[variant][0] == "parallel":  # compares bin centres
        target = vla.tokenizer.decode(vla.tokenizer.encode(target))
    distance = np.abs(actions.numpy() - target)
    assert abs(distance[:, 0].mean() - arrays[f"metric_curr_action_l1_loss_{variant}"]) < 1e-4
    assert abs(distance[:, 1:].mean() - arrays[f"metric_next_actions_l1_loss_{variant}"]) < 1e-4


def check_gradients(vla: VLA, names: np.ndarray, norms: np.ndarray, without: np.ndarray) -> None:
    """Names of the reference may carry peft's prefix."""
    mine = {name: p for name, p in vla.named_parameters() if p.requires_grad}
    plain = [name.removeprefix(FILE_PREFIX) for name in names.tolist()]
    assert {name for name, p in mine.items() if p.grad is not None} == set(plain)
    assert {name for name, p in mine.items() if p.grad is None} == {n.removeprefix(FILE_PREFIX) for n in without}
    least = 1e-6 * norms.max()
    for name, norm in zip(plain, norms.tolist(), strict=True):
        gradient = mine[name].grad
        assert gradient is not None and abs(gradient.norm().item() - norm) <= 1e-3 * max(norm, least), name


def test_gradients_of_every_parameter(vla: VLA, variant: str, arrays: Arrays) -> None:
    vla.zero_grad(set_to_none=True)
    vla(**batch(arrays, variant)).loss.backward()
    names, norms, without = (arrays[f"{name}_{variant}"] for name in ("grad_names", "grad_norms", "no_grad_names"))
    check_gradients(vla, names, norms, without)
    unused = [name for name, p in vla.named_parameters() if p.grad is None]
    assert sorted(unused) == sorted(unused_parameters(vla))


@pytest.fixture
def adapted(both_numbers: tuple[Path, Path], tmp_path: Path) -> VLA:
    """Variant b with the original's adapter on it."""
    return load(both_numbers, tmp_path, "b", adapter=both_numbers[0] / "lora_adapter").train()


def test_an_adapter_with_whole_heads(adapted: VLA, arrays: Arrays) -> None:
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == int(arrays["lora_n_trainable_b"])
    inputs, seen = batch(arrays, "b"), Seen(adapted)
    out = adapted(**inputs)
    assert out.loss is not None and out.actions is not None
    assert abs(out.loss.item() - arrays["lora_loss_b"]) < 2e-4
    np.testing.assert_allclose(seen.into_head, arrays["lora_actions_hidden_states_b"], atol=2e-4)
    np.testing.assert_allclose(out.actions.detach(), arrays["lora_predicted_actions_b"], atol=2e-4)
    out.loss.backward()
    names, norms, without = (arrays[f"lora_{name}_b"] for name in ("grad_names", "grad_norms", "no_grad_names"))
    check_gradients(adapted, names, norms, without)
    with torch.inference_mode():
        merged = merge_lora(adapted)(**inputs)
    assert abs(merged.loss.item() - arrays["lora_merged_loss_b"]) < 2e-4
    np.testing.assert_allclose(seen.into_head, arrays["lora_merged_actions_hidden_states_b"], atol=2e-4)


def test_eight_steps_of_adamw_land_where_the_originals_did(adapted: VLA, arrays: Arrays) -> None:
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.01)
    inputs = batch(arrays, "b")
    for loss, norm in zip(arrays["lora_train_losses_b"], arrays["lora_train_grad_norms_b"], strict=True):
        mine = adapted(**inputs).loss
        assert mine is not None and abs(mine.item() - loss) < 5e-4
        mine.backward()
        total = torch.cat([p.grad.flatten() for p in trained if p.grad is not None]).norm().item()
        assert total == pytest.approx(norm, rel=2e-3)
        optimizer.step()
        optimizer.zero_grad()
    state, compared = adapted.state_dict(), 0
    for name, expected in arrays.items():
        if name.startswith("after8_"):
            np.testing.assert_allclose(state[name.removeprefix("after8_")], expected, atol=1e-4)
            compared += 1
    assert compared == len([name for name in state if name.startswith(HEADS)])


@pytest.mark.parametrize("mistake", ["causal", "padding", "order of images", "positions"])
def test_each_mistake_is_seen(both_numbers: tuple[Path, Path], arrays: Arrays, tmp_path: Path, mistake: str) -> None:
    """The comparisons above are sharp enough: what the original's users suffer from moves the predictions by far more than they allow."""
    vla, inputs = load(both_numbers, tmp_path, "b"), batch(arrays, "b")
    if mistake == "causal":
        for layer in vla.language_model.model.layers:
            cast(Any, layer).self_attn.causal = True
        inputs["attention_mask"] = None
    if mistake == "padding":
        inputs["attention_mask"] = torch.ones(inputs["input_ids"].shape, dtype=torch.bool)
    if mistake == "order of images":
        inputs["pixel_values"] = inputs["pixel_values"].roll(inputs["pixel_values"].shape[1] // 2, dims=1)
    if mistake == "positions":
        vla.language_model.register_forward_pre_hook(
            lambda module, args: (args[0], torch.where(args[1] > vla.config.num_patches * 2, args[1] - 1, args[1]))
        )
    with torch.inference_mode():
        distance = (vla(**inputs).actions - torch.from_numpy(arrays["predicted_actions_b"])).abs().max()
    assert distance > 20 * 2e-4


# predict.npz: from the prompt alone


def cases(numbers: tuple[Path, Path]) -> list[dict[str, Any]]:
    """Cases whose images are there, with what the model is given."""
    base, oft = numbers
    stored, found = np.load(base / "image_path.npz"), []
    config = ProcessorConfig("", True)
    for case in json.loads((oft / "predict.json").read_text())["cases"]:
        images = []
        for key in (case["full_image"], case["wrist_image"])[: case["num_images"]]:
            resized = key if key.endswith("__resize_224") else f"{key}__resize_224"  # raw images are resized first
            images += [stored[resized]] if resized in stored else []
        if len(images) == case["num_images"]:
            images = [image.center_crop(frame) if case["center_crop"] else frame for frame in images]
            constants = (np.array(config.means), np.array(config.stds))
            case["pixel_values"] = np.concatenate([image.normalize_pixels(frame, *constants) for frame in images])
            found.append(case)
    return found


def test_from_the_prompt_alone_one_by_one_and_in_batches(both_numbers: tuple[Path, Path], tmp_path: Path) -> None:
    predicted = dict(np.load(both_numbers[1] / "predict.npz"))
    groups: dict[tuple[str, int, bool], list[dict[str, Any]]] = {}
    for case in cases(both_numbers):
        digest = hashlib.sha256(np.ascontiguousarray(case["pixel_values"]).tobytes()).hexdigest()
        assert digest == case["pixel_values_sha256"], case["case"]
        groups.setdefault((case["head"], case["num_images"], case["use_proprio"]), []).append(case)
    assert len(groups) >= 2
    for (head, images, state), members in groups.items():
        folder = oft_folder(both_numbers, tmp_path / f"{head}{images}{state}", head=head == "l1", state=state)
        kind = "l1" if head == "l1" else "parallel"
        vla = load_vla(folder, action_head=kind, num_images_in_input=images).eval()
        check_group(vla, members, predicted)


def check_group(vla: VLA, members: list[dict[str, Any]], predicted: Arrays) -> None:
    width = max(len(case["processor_input_ids"]) for case in members) + 2
    ids = torch.full((len(members), width), vla.config.pad_token_id)
    for row, case in zip(ids, members, strict=True):
        row[: len(case["processor_input_ids"])] = torch.tensor(case["processor_input_ids"])
    pixel_values = torch.from_numpy(np.stack([case["pixel_values"] for case in members]))
    proprio = None
    if members[0]["use_proprio"]:
        proprio = torch.from_numpy(np.stack([predicted[f"proprio_{case['case']}"] for case in members])).float()
    together = vla.predict_chunk(ids, pixel_values, proprio, ids != vla.config.pad_token_id)
    seen = Seen(vla)
    for row, case in enumerate(members):
        number, alone = case["case"], slice(row, row + 1)
        inputs = (ids[alone, : len(case["processor_input_ids"])], pixel_values[alone])
        inputs = (*inputs, None if proprio is None else proprio[alone])
        values = vla.predict_chunk(*inputs)
        assert seen.last.shape[1] == case["sequence_length"]
        first = case["first_hidden_state"]
        hidden = predicted[f"actions_hidden_states_{number}"]
        np.testing.assert_allclose(seen.last[0, first : first + len(hidden)], hidden, atol=2e-4)
        expected = predicted[f"normalized_actions_{number}"]
        clear = np.ones(expected.shape, bool)
        if case["head"] != "l1":
            clear = predicted[f"top1_minus_top2_{number}"].reshape(expected.shape) > 1e-3
            with torch.inference_mode():
                predicted_ids, margins = map(vla.chunks, best_tokens(vla, vla.before_actions(*inputs, None)))
            np.testing.assert_allclose(
                vla.tokenizer.decode(predicted_ids[0].numpy())[clear], expected[clear], atol=1e-12
            )
            assert margins.shape == predicted_ids.shape
        for mine in (values[0], together[row]):
            np.testing.assert_allclose(mine.numpy()[clear], expected[clear], atol=2e-4)


def test_states_and_actions_in_the_data_sets_units(both_numbers: tuple[Path, Path]) -> None:
    statistics = load_statistics(both_numbers[1])
    predicted = np.load(both_numbers[1] / "predict.npz")
    for case in json.loads((both_numbers[1] / "predict.json").read_text())["cases"]:
        number, key = case["case"], case["unnorm_key"]
        config = ProcessorConfig(key, True, action_head="l1", num_actions_chunk=8, proprio_dim=8)
        processor = Processor(config, None, statistics)  # type: ignore[arg-type]
        expected = predicted[f"actions_{number}"]
        mine = processor.unnormalize(predicted[f"normalized_actions_{number}"])
        np.testing.assert_allclose(mine, expected, atol=1e-9 if case["head"] != "l1" else 1e-6)
        if case["use_proprio"]:
            proprio = statistics[key]["proprio"]
            constant = np.equal(proprio["min"], proprio["max"])  # -1 or 1 in the original, 0 when it learns and here
            normalized = normalize_state(predicted[f"state_{number}"], proprio)
            np.testing.assert_allclose(normalized[~constant], predicted[f"proprio_{number}"][~constant], atol=1e-12)
            assert (normalized[constant] == 0).all()
