"""OpenVLA-OFT against the original's own numbers: the sequence, the mask, hidden states, actions, losses, gradients, eight steps of training.

Names, sizes and counts come from the reference set. The base model is the plain OpenVLA set's checkpoint, the heads are the OFT set's.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prismatic.checkpoint import load_vla
from prismatic.models.lora import add_lora
from prismatic.models.vla import VLA, VLAConfig, VLAOutput
from tests.conftest import OFT_EXCERPT

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
    return load_vla(folder, action_head=kind, num_images_in_input=images, **how)


@pytest.fixture(scope="module")
def arrays(oft_numbers: Path) -> Arrays:
    return dict(np.load(oft_numbers / "train.npz"))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def vla(both_numbers: tuple[Path, Path], variant: str, tmp_path_factory: pytest.TempPathFactory) -> VLA:
    return load(both_numbers, tmp_path_factory.mktemp("oft"), variant)


def pixels(images: np.ndarray, lut: np.ndarray) -> torch.Tensor:
    """(B, S, S, 3) uint8 → (B, 6, S, S) float32, as the set says: channel c is lut[c] of the image's channel c % 3."""
    return torch.from_numpy(np.stack([lut[c][images[..., c % 3]] for c in range(len(lut))], axis=1))


def batch(arrays: Arrays, variant: str) -> dict[str, Any]:
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
    target = (
        inputs["actions"]
        if VARIANTS[variant][0] == "l1"
        else torch.from_numpy(vla.tokenizer.decode(vla.tokenizer.encode(inputs["actions"].numpy())))
    )  # the discrete variant compares bin centres
    distance = (actions - target).abs()
    assert abs(distance[:, 0].mean() - arrays[f"metric_curr_action_l1_loss_{variant}"]) < 1e-4
    assert abs(distance[:, 1:].mean() - arrays[f"metric_next_actions_l1_loss_{variant}"]) < 1e-4


def check_gradients(vla: VLA, names: np.ndarray, norms: np.ndarray, without: np.ndarray) -> None:
    rename = {name.replace(".default.", "."): p for name, p in vla.named_parameters()}
    mine = {name: p.grad.norm().item() for name, p in rename.items() if p.grad is not None}
    assert set(mine) == set(names.tolist())
    assert {name for name, p in rename.items() if p.requires_grad and p.grad is None} == set(without.tolist())
    least = 1e-6 * norms.max()
    for name, norm in zip(names.tolist(), norms.tolist(), strict=True):
        assert abs(mine[name] - norm) <= 1e-3 * max(norm, least), name


def test_gradients_of_every_parameter(vla: VLA, variant: str, arrays: Arrays) -> None:
    vla.zero_grad(set_to_none=True)
    vla(**batch(arrays, variant)).loss.backward()
    check_gradients(*[vla] + [arrays[f"{name}_{variant}"] for name in ("grad_names", "grad_norms", "no_grad_names")])
    unused = [name for name, p in vla.named_parameters() if p.grad is None]
    assert sorted(unused) == sorted(vla.unused_parameters())
