"""config.json of anybody: a model of this family, in whatever form it was written, or one sentence that names the field."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from prismatic.errors import ConfigError
from prismatic.filenames import CONFIG
from prismatic.models.config_file import config_json, read_config
from prismatic.models.tiny import TINY

GOOD: dict[str, Any] = json.loads(json.dumps(config_json(TINY)))
SIGLIP = "vit_so400m_patch14_siglip_224"


def write(folder: Path, text: dict[str, Any] | None = None, **changes: Any) -> Path:
    """GOOD with changes; text: of its text_config, where ... leaves a field out."""
    content = copy.deepcopy(GOOD) | changes
    if text is not None:
        content["text_config"] |= text
        content["text_config"] = {name: value for name, value in content["text_config"].items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(content))
    return folder / CONFIG


@pytest.mark.parametrize(
    "form",
    [
        {}, {"image_sizes": 128}, {"text": {"num_key_value_heads": None}}, {"text": {"rope_scaling": {"type": "default"}}},
        {"text": {"rope_theta": ..., "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}}, {"text": {"rope_theta": ...}},
    ],
    ids=str,
)  # fmt: skip
def test_every_form_that_was_ever_written_is_read(tmp_path: Path, form: dict[str, Any]) -> None:
    assert read_config(write(tmp_path, **form)) == TINY


def test_every_form_of_the_rotary_base_counts(tmp_path: Path) -> None:
    for form in ({"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5}):
        assert read_config(write(tmp_path, text=form)).text_config.rope_theta == 5e5


@pytest.mark.parametrize(
    "change",
    [
        *({"text": text} for text in (
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"rope_scaling": {"type": "dynamic"}}, {"rope_scaling": 3},
            {"rope_scaling": {"rope_type": "default", "type": "linear"}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, {"rope_parameters": {"rope_theta": 5e5}},
            {"rope_scaling": {"factor": 4.0}}, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {"partial_rotary_factor": 0.5},
            {"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}, {"pretraining_tp": 2},
            {"head_dim": 64}, {"num_hidden_layers": 10**7}, {"num_hidden_layers": 0}, {"num_hidden_layers": True}, {"hidden_size": 127},
            {"hidden_size": 0}, {"num_attention_heads": 3}, {"num_key_value_heads": 3}, {"rms_norm_eps": 0}, {"rms_norm_eps": -1e-6},
            {"rope_theta": 0}, {"rope_theta": "1e4"}, {"vocab_size": 300}, {"vocab_size": 10**9}, {"intermediate_size": None},
        )),
        {"image_sizes": [128, 224]}, {"image_sizes": []}, {"image_sizes": 0}, {"image_sizes": "128"}, {"image_sizes": 10**6},
        {"timm_model_ids": ["hf-hub:someone/model", SIGLIP]}, {"timm_model_ids": []}, {"timm_model_ids": 3},
        {"tiny_timm_kwargs": {SIGLIP: {"checkpoint_path": "/etc/passwd"}}}, {"tiny_timm_kwargs": {SIGLIP: {"pretrained": True}}},
        {"tiny_timm_kwargs": {"hf-hub:someone/model": {}}}, {"tiny_timm_kwargs": {SIGLIP: {"depth": 10**6}}},
        {"vision_stem": [0]}, {"vision_stem": "abc"}, {"vision_stem": [8] * 5}, {"tiny_timm_kwargs": {SIGLIP: {"patch_size": 7}}},
        {"tiny_timm_kwargs": {SIGLIP: {"patch_size": 32}}, "vision_stem": []},
        {"tiny_timm_kwargs": {SIGLIP: {"patch_size": 160}}}, {"tiny_timm_kwargs": {SIGLIP: {"embed_dim": 97, "num_heads": 3}}},
        {"vision_stem": [8, 8], "tiny_timm_kwargs": {}}, {"vision_stem": [8, 8], "tiny_timm_kwargs": {SIGLIP: {"patch_size": 16}}},
        *({"tiny_timm_kwargs": {SIGLIP: size}, "vision_stem": []} for size in ({"embed_dim": 96}, {"embed_dim": 100}, {"num_heads": 3})),
        {"num_images_in_input": 3}, {"n_action_bins": 1}, {"n_action_bins": 5000}, {"pad_token_id": 5000},
        {"empty_token_id": -1}, {"num_images_in_input": 0}, {"num_images_in_input": None}, {"text_config": []}, {"text_config": None},
        {"pad_to_multiple_of": 5000}, {"image_resize_strategy": None}, {"arch_specifier": "linear"}, {"use_fused_vision_backbone": False},
    ],
    ids=str,
)  # fmt: skip
def test_another_model_is_refused_by_field(tmp_path: Path, change: dict[str, Any]) -> None:
    path, begun = write(tmp_path, **change), time.monotonic()
    with pytest.raises(ConfigError) as error:
        read_config(path)
    sentence, field = str(error.value), next(iter(change.get("text") or change))
    assert "\n" not in sentence and str(path) in sentence and time.monotonic() - begun < 2
    assert any(name in sentence for name in (field, "hidden_size", "vocab_size", "patch_size", "embed_dim"))
