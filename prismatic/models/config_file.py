"""config.json of a checkpoint folder ↔ VLAConfig, looked at before a model is built: sizes within limits, no field ignored that changes answers.

A folder is data, not a program: the towers are the two that are built here, and of timm's keywords only sizes are taken. Surprising: older
and newer transformers write the same model differently (`rope_theta` and `rope_parameters`, `image_sizes` as one number or two).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta

from prismatic.errors import ConfigError
from prismatic.models.llama import LlamaConfig
from prismatic.models.vision import DINO_ID, SIGLIP_ID
from prismatic.models.vla import VLAConfig
from prismatic.ranges import Count, wanted
from prismatic.records import COPY_AGAIN, read_object

ROPE_THETA = 10_000.0  # Llama-2's, where nothing is said
Size = Annotated[int, Meta(ge=1, le=2**16)]
Side = Annotated[int, Meta(ge=14, le=4096)]  # pixels
Layers = Annotated[int, Meta(ge=1, le=256)]
Vocabulary = Annotated[int, Meta(ge=2, le=2**20)]
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
NATIVE_BASE = "dinosiglip-224px+7b"
# What another model than this one has: the only values that answer as Llama-2 does.
PLAIN_TEXT = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "pretraining_tp": 1,
}


class TowerSizes(TypedDict, total=False):
    """The keywords of timm that a small tower has; nothing that opens a file or asks a server."""

    embed_dim: Size
    depth: Layers
    num_heads: Size
    patch_size: Annotated[int, Meta(ge=1, le=256)]
    mlp_ratio: Annotated[float, Meta(gt=0, le=64)]


class TextConfig(TypedDict, total=False):
    hidden_size: Size
    intermediate_size: Annotated[int, Meta(ge=1, le=2**18)]
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    vocab_size: Vocabulary
    rms_norm_eps: Annotated[float, Meta(gt=0, lt=1)]
    rope_theta: Annotated[float, Meta(ge=1, le=1e9)]
    max_position_embeddings: Annotated[int, Meta(ge=1, le=2**24)]


class ModelFile(TypedDict, total=False):
    image_size: Side
    image_sizes: tuple[Side, Side]
    num_images_in_input: Annotated[int, Meta(ge=1, le=8)]
    action_head: Literal["tokens", "parallel", "l1"]
    num_actions_chunk: Annotated[int, Meta(ge=1, le=256)]
    action_dim: Annotated[int, Meta(ge=1, le=256)]
    proprio_dim: Annotated[int, Meta(ge=0, le=1024)]
    stop_token: bool
    timm_model_ids: tuple[Literal["vit_large_patch14_reg4_dinov2.lvd142m"], Literal["vit_so400m_patch14_siglip_224"]]
    tiny_timm_kwargs: dict[str, TowerSizes]
    vision_stem: Annotated[list[Annotated[int, Meta(ge=1, le=4096)]], Meta(max_length=8)]
    text_config: TextConfig
    tiny_text_config: TextConfig
    pad_to_multiple_of: Count
    n_action_bins: Annotated[int, Meta(ge=2, le=2**16)]
    bos_token_id: Count
    eos_token_id: Count
    pad_token_id: Count
    empty_token_id: Count


def read_config(path: Path) -> VLAConfig:
    """config.json of an OpenVLA folder or of the native Prismatic layout. ConfigError for an architecture that this is not."""
    raw = read_model_config(Path(path))
    check_architecture(raw, Path(path))
    text = {**raw.get("text_config", {}), **raw.get("tiny_text_config", {})}
    known = {f.name for f in dataclasses.fields(LlamaConfig)}
    values = {f.name: raw[f.name] for f in dataclasses.fields(VLAConfig) if f.name in raw and f.name != "text_config"}
    for name in ("timm_model_ids", "vision_stem"):
        if name in values:
            values[name] = tuple(values[name])
    if "image_sizes" in raw:
        values["image_size"] = raw["image_sizes"][0]
    sizes = {name: value for name, value in text.items() if name in known}
    return VLAConfig(text_config=LlamaConfig(**sizes), **values)


def config_json(config: VLAConfig) -> dict[str, Any]:
    """config.json as OpenVLA's own code reads it; what differs from openvla-7b's sizes stands under this project's names."""
    defaults = VLAConfig()
    own = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name not in ("image_size", "text_config")
    }
    always = ("action_head", "timm_model_ids", "pad_to_multiple_of", "n_action_bins", "pad_token_id")
    return {
        **PUBLISHED,
        "image_sizes": [config.image_size, config.image_size],
        "text_config": {
            "model_type": "llama",
            "pad_token_id": config.pad_token_id,
            **dataclasses.asdict(config.text_config),
        },
        **{name: value for name, value in own.items() if name in always or value != getattr(defaults, name)},
    }


def read_model_config(path: Path) -> dict[str, Any]:
    """The content of a config.json, in one form whoever wrote it. ConfigError that names the first field that makes no model of this family."""
    raw = read_object(path)
    if isinstance(raw.get("image_sizes"), int):
        raw["image_sizes"] = [raw["image_sizes"]] * 2
    for name in ("text_config", "tiny_text_config"):
        if isinstance(raw.get(name), dict):
            raw[name] = _plain_text(raw[name], f"{path}: {name}")
    try:
        found = msgspec.convert(raw, ModelFile)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$.")
        raise ConfigError(f"{path}: {place.rstrip('`')}: {wanted(message)}: {COPY_AGAIN}") from None
    sizes = found.get("image_sizes", (0, 0))
    if sizes[0] != sizes[1]:
        raise ConfigError(f"{path}: image_sizes is {list(sizes)}, but only square images are built here")
    for tower, keywords in raw.get("tiny_timm_kwargs", {}).items():
        if unknown := sorted({*keywords} - {*TowerSizes.__annotations__}) or [tower] * (
            tower not in (DINO_ID, SIGLIP_ID)
        ):
            raise ConfigError(
                f"{path}: tiny_timm_kwargs has {unknown[0]!r}: only sizes of the two towers may stand there "
                f"({', '.join(TowerSizes.__annotations__)})"
            )
    _check_vocabulary(raw, path)
    return raw


def check_architecture(raw: Mapping[str, Any], path: Path) -> None:
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
                f"{path}: {name} is {raw.get(name)!r}, but only {PUBLISHED[name]!r} (openvla-7b) is built here"
            )


def _check_vocabulary(raw: Mapping[str, Any], path: Path) -> None:
    """The actions and the special ids lie within the embedding table, where the file says how large that is."""
    rows = {**raw.get("text_config", {}), **raw.get("tiny_text_config", {})}.get("vocab_size")
    if rows is None:
        return
    words = rows - raw.get("pad_to_multiple_of", 64)
    if words <= raw.get("n_action_bins", 256):
        raise ConfigError(f"{path}: a vocab_size of {rows} leaves no room for text beside the actions: {COPY_AGAIN}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "empty_token_id"):
        if raw.get(name, 0) >= rows:
            raise ConfigError(f"{path}: {name} is {raw[name]}, but vocab_size is {rows}: {COPY_AGAIN}")


def _plain_text(text: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One form of text_config, with rope_theta wherever it stood; ConfigError for what would make another model of it."""
    text = dict(text)
    rope = text.pop("rope_parameters", None)
    scaling = text.pop("rope_scaling", None)
    for name, value in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if value is None:
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{where}.{name} is {value!r:.60}, not an object: {COPY_AGAIN}")
        kind = value.get("rope_type", value.get("type", "default"))
        if kind != "default":
            raise ConfigError(
                f"{where}.{name} asks for rotary positions of type {kind!r:.40}, but only Llama-2's own are built here"
            )
        theta = value.get("rope_theta", text.get("rope_theta", ROPE_THETA))
        if text.setdefault("rope_theta", theta) != theta:
            raise ConfigError(f"{where}: rope_theta and {name}.rope_theta differ: {COPY_AGAIN}")
    if text.get("num_key_value_heads", 1) is None:  # older configs: as many as heads
        text.pop("num_key_value_heads")
        if "num_attention_heads" in text:
            text["num_key_value_heads"] = text["num_attention_heads"]
    for name, value in PLAIN_TEXT.items():
        if text.get(name, value) != value:
            raise ConfigError(f"{where}.{name} is {text[name]!r:.40}, but only {value!r} (Llama-2) is built here")
    heads, width = text.get("num_attention_heads", 1), text.get("hidden_size", 1)
    if (
        all(type(value) is int and value > 0 for value in (heads, width))
        and "num_attention_heads" in text
        and "hidden_size" in text
    ):
        kv = text.get("num_key_value_heads", heads)
        if width % (2 * heads) or (type(kv) is int and kv > 0 and heads % kv):
            raise ConfigError(
                f"{where}: hidden_size {width} does not divide among {heads} heads ({kv} of keys and values)"
            )
        if text.get("head_dim") not in (None, width // heads):
            raise ConfigError(
                f"{where}.head_dim is {text['head_dim']!r:.40}, but only hidden_size / heads is built here"
            )
    return text
