"""The joined model against the original (closeness.py), names and counts at full size; that it looks and reads; whose config.json is taken."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prismatic.checkpoint import load_vla
from prismatic.errors import ConfigError
from prismatic.models.config_file import config_json, read_config
from prismatic.models.lora import add_lora, lora_layers
from prismatic.models.vla import VLA, VLAConfig
from tests import closeness, original
from tests.conftest import EXCERPT


@pytest.mark.parametrize("part", [closeness.model, closeness.adapter], ids=lambda part: part.__name__)
def test_every_difference_is_within_its_tolerance(numbers: Path, part: Callable) -> None:
    closeness.check(part(numbers))


def test_full_size_has_the_published_names_and_shapes() -> None:
    rows = [line.split("\t") for line in (EXCERPT / "openvla7b_keys.tsv").read_text().splitlines()[1:]]
    published = {name: tuple(int(n) for n in shape.split("x")) for name, shape in rows}
    with torch.device("meta"):
        vla = VLA(VLAConfig())
    assert {name: tuple(tensor.shape) for name, tensor in vla.state_dict().items()} == published
    assert len(published) == 982
    assert sum(p.numel() for p in vla.parameters()) == 7_541_237_184
    facts = json.loads((EXCERPT / "reference_facts.json").read_text())["lora_r32"]
    modules = [line.split("\t") for line in (EXCERPT / "lora_modules.txt").read_text().splitlines()]
    add_lora(vla, rank=32)
    adapted = {name: type(layer.get_base_layer()).__name__ for name, layer in lora_layers(vla)}
    assert adapted == {row[0]: row[1] for row in modules} and len(adapted) == 439
    assert sum(p.numel() for p in vla.parameters() if p.requires_grad) == facts["trainable_params"] == 110_828_288
    assert sum(p.numel() for p in vla.parameters()) == facts["all_params_with_lora"] == 7_652_065_472
    for part, count in facts["trainable_by_part"].items():
        assert sum(p.numel() for p in vla.get_submodule(part).parameters() if p.requires_grad) == count, part


def test_it_looks_and_it_reads_and_few_logits_give_the_same_loss(numbers: Path) -> None:
    vla, batch = load_vla(numbers / "checkpoint"), original.batch(numbers)
    words, pixels = batch["input_ids"][:1], batch["pixel_values"][:1]
    with torch.inference_mode():
        few, every = vla(**batch), vla(**batch, all_logits=True)
        black, white = (vla(words, None, torch.full_like(pixels, level)).logits for level in (-2.0, 2.0))
        other = vla(torch.where(words == words[0, 10], 300, words), None, pixels).logits
        same = vla(words, None, pixels).logits
    assert (black[:, -1] - white[:, -1]).abs().max() > 1e-2
    assert (other[:, -1] - same[:, -1]).abs().max() > 1e-2
    counts = batch["labels"][:, 1:] != -100
    assert few.logits.shape == (int(counts.sum()), vla.config.text_config.vocab_size)
    torch.testing.assert_close(few.loss, every.loss)
    torch.testing.assert_close(few.logits, every.logits[:, vla.config.num_patches : -1][counts])


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
