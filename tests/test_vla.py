"""The joined model against the original: counts at full size, features, logits, loss, gradients; and that it looks and reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from prismatic.checkpoint import load_vla
from prismatic.errors import ConfigError
from prismatic.models.config_file import config_json, read_config
from prismatic.models.lora import add_lora, lora_layers
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.unused import unused_parameters
from prismatic.models.vision import patch_features
from prismatic.models.vla import VLA, VLAConfig
from tests.conftest import EXCERPT


@pytest.fixture(scope="module")
def vla(numbers: Path) -> VLA:
    return load_vla(numbers / "checkpoint")


@pytest.fixture(scope="module")
def arrays(numbers: Path) -> dict[str, np.ndarray]:
    return dict(np.load(numbers / "forward.npz"))


def test_full_size_has_the_published_names_and_shapes() -> None:
    rows = [line.split("\t") for line in (EXCERPT / "openvla7b_keys.tsv").read_text().splitlines()[1:]]
    published = {name: tuple(int(n) for n in shape.split("x")) for name, shape in rows}
    with torch.device("meta"):
        vla = VLA(VLAConfig())
    assert {name: tuple(tensor.shape) for name, tensor in vla.state_dict().items()} == published
    assert len(published) == 982
    assert sum(p.numel() for p in vla.parameters()) == 7_541_237_184


def test_lora_at_full_size_adapts_the_originals_modules() -> None:
    facts = json.loads((EXCERPT / "reference_facts.json").read_text())["lora_r32"]
    rows = [line.split("\t") for line in (EXCERPT / "lora_modules.txt").read_text().splitlines()]
    with torch.device("meta"):
        vla = add_lora(VLA(VLAConfig()), rank=32)
    adapted = {name: type(layer.get_base_layer()).__name__ for name, layer in lora_layers(vla)}
    assert adapted == {row[0]: row[1] for row in rows} and len(adapted) == 439
    assert sum(p.numel() for p in vla.parameters() if p.requires_grad) == facts["trainable_params"] == 110_828_288
    assert sum(p.numel() for p in vla.parameters()) == facts["all_params_with_lora"] == 7_652_065_472
    for part, count in facts["trainable_by_part"].items():
        assert sum(p.numel() for p in vla.get_submodule(part).parameters() if p.requires_grad) == count, part


def test_features_of_each_tower(vla: VLA, arrays: dict[str, np.ndarray], batch: dict[str, torch.Tensor]) -> None:
    pixels = batch["pixel_values"]
    with torch.inference_mode():
        dino = patch_features(vla.vision_backbone.featurizer, pixels[:, :3])
        siglip = patch_features(vla.vision_backbone.fused_featurizer, pixels[:, 3:])
        projected = vla.projector(vla.vision_backbone(pixels))
    np.testing.assert_allclose(dino, arrays["dino_patches"], atol=1e-4)
    np.testing.assert_allclose(siglip, arrays["siglip_patches"], atol=1e-4)
    np.testing.assert_allclose(projected, arrays["projector_features"], atol=5e-5)


def test_logits_and_loss(vla: VLA, arrays: dict[str, np.ndarray], batch: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        out = vla(**batch, all_logits=True)
    assert out.loss is not None
    valid = arrays["valid_mask"]
    logits = out.logits.numpy()
    np.testing.assert_allclose(logits[..., 31744:32000][valid], arrays["logits_action"][valid], atol=3e-4)
    two = np.sort(logits, axis=-1)[..., -2:]
    clear = valid & (two[..., 1] - two[..., 0] > 1e-3)
    np.testing.assert_array_equal(logits.argmax(-1)[clear], arrays["logits_argmax"][clear])
    np.testing.assert_allclose(
        np.log(np.exp(logits.astype(np.float64)).sum(-1))[valid], arrays["logits_logsumexp"][valid], atol=1e-4
    )
    assert abs(out.loss.item() - float(arrays["loss_float64"])) < 1e-4


def test_full_rows_of_logits(reference: Path) -> None:
    arrays = np.load(reference / "forward.npz")
    vla = load_vla(reference / "checkpoint")
    with torch.inference_mode():
        pixels = torch.from_numpy(arrays["pixel_values"]).float()
        out = vla(torch.from_numpy(arrays["input_ids"]), None, pixels)
    positions = arrays["logits_last9_positions"]
    np.testing.assert_allclose(out.logits[0, positions[0]], arrays["logits_last9_full_seq0"], atol=3e-4)
    for row, place in enumerate(positions):
        np.testing.assert_allclose(out.logits[row, place, ::16], arrays["logits_last9_stride16"][row], atol=3e-4)


def test_logits_only_where_labels_are_give_the_same_loss(vla: VLA, batch: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        few, every = vla(**batch), vla(**batch, all_logits=True)
    counts = batch["labels"][:, 1:] != -100
    assert few.logits.shape == (int(counts.sum()), vla.config.text_config.vocab_size)
    torch.testing.assert_close(few.loss, every.loss)
    torch.testing.assert_close(few.logits, every.logits[:, vla.config.num_patches : -1][counts])


def test_gradients_of_every_parameter(vla: VLA, arrays: dict[str, np.ndarray], batch: dict[str, torch.Tensor]) -> None:
    vla.zero_grad(set_to_none=True)
    loss = vla(**batch).loss
    assert loss is not None
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in vla.named_parameters() if p.grad is not None}
    assert set(norms) == set(arrays["grad_names"].tolist())
    assert {name for name, p in vla.named_parameters() if p.grad is None} == set(arrays["no_grad_names"].tolist())
    for name, norm in zip(arrays["grad_names"].tolist(), arrays["grad_norms"].tolist(), strict=True):
        assert norms[name] == pytest.approx(norm, rel=1e-3, abs=1e-9), name


def test_it_looks_and_it_reads(vla: VLA, batch: dict[str, torch.Tensor]) -> None:
    words, pixels = batch["input_ids"][:1], batch["pixel_values"][:1]
    with torch.inference_mode():
        black, white = (vla(words, None, torch.full_like(pixels, level)).logits for level in (-2.0, 2.0))
        other = vla(torch.where(words == words[0, 10], 300, words), None, pixels).logits
        same = vla(words, None, pixels).logits
    assert (black[:, -1] - white[:, -1]).abs().max() > 1e-2
    assert (other[:, -1] - same[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_resize_strategy", None), ("arch_specifier", "linear"), ("use_fused_vision_backbone", False)],
)
def test_another_architecture_is_refused(tmp_path: Path, key: str, value: object) -> None:
    config = json.loads((EXCERPT / "checkpoint" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ConfigError, match=key):
        read_config(tmp_path / "config.json")


def test_the_originals_config_is_read_with_the_converters_defaults(tmp_path: Path) -> None:
    config = read_config(EXCERPT / "checkpoint" / "config.json")
    text = config.text_config
    assert (text.rms_norm_eps, text.max_position_embeddings, text.rope_theta) == (1e-6, 2048, 1e4)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    assert read_config(tmp_path / "config.json") == config


def test_the_parameters_without_a_gradient_are_those_that_are_named() -> None:
    """Several processes leave them out: they would wait for ever for a gradient of theirs."""
    vla = random_vla(TINY, seed=0)
    pixels = torch.rand(1, 12, TINY.image_size, TINY.image_size)
    vla(torch.tensor([[1, 5, 6, 7]]), None, pixels, torch.tensor([[-100, -100, 6, 7]])).loss.backward()
    without = [name for name, parameter in vla.named_parameters() if parameter.grad is None]
    assert without == unused_parameters(vla) and any("blocks.2.attn" in name for name in without)
    assert not any("blocks.1." in name for name in without)
