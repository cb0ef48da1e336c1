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


def write(folder: Path, *, text: dict[str, Any] | None = None, without: tuple[str, ...] = (), **changes: Any) -> Path:
    content = copy.deepcopy(GOOD) | changes
    if text is not None:
        content["text_config"] |= text
    for name in without:
        content["text_config"].pop(name)
    (folder / CONFIG).write_text(json.dumps(content))
    return folder / CONFIG


def refused(path: Path) -> str:
    begun = time.monotonic()
    with pytest.raises(ConfigError) as error:
        read_config(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert time.monotonic() - begun < 2
    return str(error.value)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_config(write(tmp_path)) == TINY


def test_every_form_of_the_rotary_base_counts(tmp_path: Path) -> None:
    for form in ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5, "rope_scaling": None},
                 {"rope_theta": 5e5, "rope_scaling": {"type": "default"}}):  # fmt: skip
        path = write(tmp_path, text=form, without=() if "rope_theta" in form else ("rope_theta",))
        assert read_config(path).text_config.rope_theta == 5e5


def test_one_number_is_the_size_of_both_towers(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, image_sizes=128)).image_size == 128


def test_no_number_of_key_heads_means_all(tmp_path: Path) -> None:
    path = write(tmp_path, text={"num_key_value_heads": None})
    assert read_config(path).text_config.num_key_value_heads == TINY.text_config.num_attention_heads


@pytest.mark.parametrize(
    "text",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"rope_scaling": {"type": "dynamic"}}, {"rope_scaling": 3},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, {"rope_parameters": {"rope_theta": 5e5}},
        {"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}, {"pretraining_tp": 2},
        {"head_dim": 64}, {"num_hidden_layers": 10**7}, {"num_hidden_layers": 0}, {"num_hidden_layers": True}, {"hidden_size": 127},
        {"hidden_size": 0}, {"num_attention_heads": 3}, {"num_key_value_heads": 3}, {"rms_norm_eps": 0}, {"rms_norm_eps": -1e-6},
        {"rope_theta": 0}, {"rope_theta": "1e4"}, {"vocab_size": 300}, {"vocab_size": 10**9}, {"intermediate_size": None},
    ],
    ids=str,
)  # fmt: skip
def test_another_decoder_is_refused_by_field(tmp_path: Path, text: dict[str, Any]) -> None:
    sentence = refused(write(tmp_path, text=text))
    assert next(iter(text)) in sentence or "hidden_size" in sentence


@pytest.mark.parametrize(
    "change",
    [
        {"image_sizes": [128, 224]}, {"image_sizes": []}, {"image_sizes": 0}, {"image_sizes": "128"}, {"image_sizes": 10**6},
        {"timm_model_ids": ["hf-hub:someone/model", "vit_so400m_patch14_siglip_224"]}, {"timm_model_ids": []},
        {"timm_model_ids": ["vit_base_patch16_224", "vit_base_patch16_224"]}, {"timm_model_ids": 3},
        {"tiny_timm_kwargs": {"vit_so400m_patch14_siglip_224": {"checkpoint_path": "/etc/passwd"}}},
        {"tiny_timm_kwargs": {"vit_so400m_patch14_siglip_224": {"pretrained": True}}},
        {"tiny_timm_kwargs": {"hf-hub:someone/model": {}}}, {"tiny_timm_kwargs": {"vit_so400m_patch14_siglip_224": {"depth": 10**6}}},
        {"vision_stem": [0]}, {"vision_stem": "abc"}, {"n_action_bins": 1}, {"n_action_bins": 5000}, {"pad_token_id": 5000},
        {"empty_token_id": -1}, {"num_images_in_input": 0}, {"num_images_in_input": None}, {"text_config": []}, {"text_config": None},
        {"pad_to_multiple_of": 5000},
    ],
    ids=str,
)  # fmt: skip
def test_another_model_is_refused_by_field(tmp_path: Path, change: dict[str, Any]) -> None:
    sentence = refused(write(tmp_path, **change))
    assert next(iter(change)) in sentence or "vocab_size" in sentence
