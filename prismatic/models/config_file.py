"""config.json of a checkpoint folder ↔ VLAConfig, looked at before a model is built: sizes within limits, no field ignored that changes answers.

A folder is data, not a program: the towers are the two that are built here, and of timm's keywords only sizes are taken. Surprising: older
and newer transformers write the same model differently (`rope_theta` and `rope_parameters`, `image_sizes` as one number or two).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from prismatic.errors import ConfigError
from prismatic.models.llama import Few, LlamaConfig, Size
from prismatic.models.vision import DINO_ID, SIGLIP_ID
from prismatic.models.vla import PATCH_SIZE, VLAConfig
from prismatic.records import COPY_AGAIN, fields_of, read_object

ROPE_THETA = 10_000.0  # Llama-2's, where nothing is said
# What openvla-7b's config.json says beside its sizes; the fields of EXPECTED make another model if they differ.
PUBLISHED: dict[str, Any] = {
    "architectures": ["OpenVLAForActionPrediction"],
    "model_type": "openvla",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "vision_backbone_id": "dinosiglip-vit-so-224px",
    "llm_backbone_id": "llama2-7b-pure",
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "image_resize_strategy": "resize-naive",
    "timm_override_act_layers": [None, None],
    "use_fused_vision_backbone": True,
    "llm_max_length": 2048,
    "output_projector_states": False,
}
EXPECTED = ("model_type", "arch_specifier", "image_resize_strategy", "use_fused_vision_backbone")
ALWAYS = ("action_head", "timm_model_ids", "pad_to_multiple_of", "n_action_bins", "pad_token_id")  # are written
TOWERS = [DINO_ID, SIGLIP_ID]
SIDES = range(14, 4096)  # pixels
NATIVE_BASE = "dinosiglip-224px+7b"
# What another model than this one has: the only values that answer as Llama-2 does.
PLAIN_TEXT = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
}


class TowerSizes(TypedDict, total=False):
    """The keywords of timm that a small tower has; nothing that opens a file or asks a server."""

    embed_dim: Size
    depth: Few
    num_heads: Size
    patch_size: Few
    mlp_ratio: Annotated[float, Meta(gt=0, le=64)]


def read_config(path: Path) -> VLAConfig:
    """config.json of an OpenVLA folder or of the native Prismatic layout. ConfigError that names the first field of another model."""
    raw = read_object(path)
    _check_architecture(raw, path)
    text: dict[str, Any] = {}
    for name in ("text_config", "tiny_text_config"):
        if name in raw:
            text |= _plain_text(raw[name], f"{path}: {name}")
    sides = raw.get("image_sizes", raw.get("image_size", VLAConfig.image_size))
    side, *others = sides if isinstance(sides, list) and len(sides) == 2 else [sides]
    if type(side) is not int or side not in SIDES or others not in ([], [side]):
        raise ConfigError(
            f"{path}: image_sizes is {sides!r:.60}, but only square images of {SIDES.start} to {SIDES.stop} pixels a side are built here"
        )
    _check_towers(raw, path)
    config = fields_of({**raw, "text_config": text, "image_size": side}, VLAConfig, str(path))
    _check_sizes(config, text, path)
    return config


def config_json(config: VLAConfig) -> dict[str, Any]:
    """config.json as OpenVLA's own code reads it; what differs from openvla-7b's sizes stands under this project's names."""
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del own["image_size"], own["text_config"]
    text = {"model_type": "llama", "pad_token_id": config.pad_token_id, **dataclasses.asdict(config.text_config)}
    changed = {name: value for name, value in own.items() if name in ALWAYS or value != getattr(VLAConfig(), name)}
    return {**PUBLISHED, "image_sizes": [config.image_size] * 2, "text_config": text, **changed}


def _check_architecture(raw: Mapping[str, Any], path: Path) -> None:
    """ConfigError for a config.json, OpenVLA's or the native Prismatic one, of another architecture than openvla-7b's."""
    if isinstance(raw.get("vla"), dict):
        if NATIVE_BASE not in str(raw["vla"].get("base_vlm")):
            raise ConfigError(
                f"{path}: base_vlm {raw['vla'].get('base_vlm')!r} is not prism-{NATIVE_BASE}, the only one built here"
            )
        return
    for name in EXPECTED:
        if raw.get(name) != PUBLISHED[name]:
            raise ConfigError(
                f"{path}: {name} is {raw.get(name)!r:.60}, but only {PUBLISHED[name]!r} (openvla-7b) is built here"
            )


def _check_towers(raw: Mapping[str, Any], path: Path) -> None:
    if raw.get("timm_model_ids", TOWERS) != TOWERS:
        raise ConfigError(f"{path}: timm_model_ids is {raw['timm_model_ids']!r:.60}, but only {TOWERS} is built here")
    sizes = raw.get("tiny_timm_kwargs", {})
    fields_of(sizes, dict[str, TowerSizes], f"{path}: tiny_timm_kwargs")
    known = {*TowerSizes.__annotations__}
    for tower, keywords in sizes.items():
        if unknown := sorted({*keywords} - known) + [tower] * (tower not in TOWERS):
            raise ConfigError(
                f"{path}: tiny_timm_kwargs has {unknown[0]!r:.60}: only sizes of the two towers may stand there ({', '.join(sorted(known))})"
            )


def _check_sizes(config: VLAConfig, text: Mapping[str, Any], path: Path) -> None:
    """Sizes fit each other: heads divide the width, the actions and the special ids lie within the embedding table."""
    llama = config.text_config
    width, heads, kv, rows = llama.hidden_size, llama.num_attention_heads, llama.num_key_value_heads, llama.vocab_size
    if width % (2 * heads) or heads % kv:
        raise ConfigError(f"{path}: hidden_size {width} does not divide among {heads} heads ({kv} of keys and values)")
    if text.get("head_dim") not in (None, width // heads):
        raise ConfigError(
            f"{path}: head_dim is {text['head_dim']!r:.40}, but only hidden_size / num_attention_heads is built here"
        )
    for tower in TOWERS:
        sizes = config.tiny_timm_kwargs.get(tower, {})
        patch, halvings = sizes.get("patch_size", PATCH_SIZE), 2 ** len(config.vision_stem)
        if patch > config.image_size or patch % halvings:
            raise ConfigError(
                f"{path}: a patch_size of {patch} doesn't fit images of {config.image_size} pixels, which a vision_stem of "
                f"{len(config.vision_stem)} convolutions makes {halvings} times smaller: {COPY_AGAIN}"
            )
        width, heads = (sizes.get(name) for name in ("embed_dim", "num_heads"))
        if (width is None) != (heads is None):
            raise ConfigError(f"{path}: {tower}: embed_dim and num_heads stand together or not at all: {COPY_AGAIN}")
        if width and heads and width % heads:
            raise ConfigError(f"{path}: {tower}: embed_dim {width} does not divide among {heads} heads: {COPY_AGAIN}")
    if len(patches := {config.tiny_timm_kwargs.get(tower, {}).get("patch_size", PATCH_SIZE) for tower in TOWERS}) > 1:
        raise ConfigError(f"{path}: the two towers have another patch_size each, {sorted(patches)}: {COPY_AGAIN}")
    if config.vocab_size <= config.n_action_bins:
        raise ConfigError(f"{path}: a vocab_size of {rows} leaves no room for text beside the actions: {COPY_AGAIN}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "empty_token_id"):
        if getattr(config, name) >= rows:
            raise ConfigError(f"{path}: {name} is {getattr(config, name)}, but vocab_size is {rows}: {COPY_AGAIN}")


def _plain_text(text: Any, where: str) -> dict[str, Any]:
    """One form of text_config, with rope_theta wherever it stood; ConfigError for what would make another model of it."""
    text = dict(fields_of(text, dict[str, Any], where))
    for name in ("rope_parameters", "rope_scaling"):
        value = text.pop(name, None)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{where}.{name} is {value!r:.60}, not an object: {COPY_AGAIN}")
        kind = next(
            (value[name] for name in ("rope_type", "type") if value.get(name, "default") != "default"), "default"
        )
        others = [other for other in value if other not in ("rope_type", "type", "rope_theta")]
        if kind != "default" or others:
            asked = f"type {kind!r:.40}" if kind != "default" else f"another {others[0]:.40}"
            raise ConfigError(
                f"{where}.{name} asks for rotary positions of {asked}, but only Llama-2's own are built here"
            )
        theta = value.get("rope_theta", text.get("rope_theta", ROPE_THETA))
        if text.setdefault("rope_theta", theta) != theta:
            raise ConfigError(f"{where}: rope_theta and {name}.rope_theta differ: {COPY_AGAIN}")
    if text.get("num_key_value_heads", 1) is None:  # older configs: as many as heads
        text["num_key_value_heads"] = text.get("num_attention_heads", LlamaConfig.num_attention_heads)
    for name, value in PLAIN_TEXT.items():
        if text.get(name, value) != value:
            raise ConfigError(f"{where}.{name} is {text[name]!r:.40}, but only {value!r} (Llama-2) is built here")
    return text
