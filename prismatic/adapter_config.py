"""adapter_config.json as any version of peft wrote it → peft's own LoraConfig: each field is honoured, or at its default, or refused by name.

Surprising: where the modules are chosen by a regular expression, an exclusion or by layers, the tensors in the file say which they are, and
nobody runs a foreign expression. A plain list is taken at its word, so that a lost tensor is noticed.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Required, TypedDict

from msgspec import Meta

from prismatic.errors import ConfigError
from prismatic.filenames import ADAPTER_CONFIG
from prismatic.ranges import Rank, Share
from prismatic.records import COPY_AGAIN, fields_of, read_object

Alpha = Annotated[float, Meta(gt=0, le=1e6)]  # some tools write 16.0
Names = Annotated[list[str], Meta(min_length=1)]
PATTERNS = ("exclude_modules", "layers_to_transform", "layers_pattern")


class HonouredFields(TypedDict, total=False):
    """What changes the answers and is done here as peft does it."""

    r: Required[Rank]
    lora_alpha: Required[Alpha]
    lora_dropout: Share
    target_modules: Required[Names | Annotated[str, Meta(min_length=1)]]
    exclude_modules: Names | str | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    rank_pattern: dict[str, Rank] | None
    alpha_pattern: dict[str, Alpha] | None
    use_rslora: bool


# What says where an adapter comes from or how it was run, not what it computes.
INDIFFERENT = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "ensure_weight_tying", "eva_config",
)  # fmt: skip
PLAIN = {"peft_type": "LORA", "bias": "none"}  # every other field that isn't named here has to be empty or false
# Starts of an adapter that leave the base as it is; pissa, olora, corda, loftq and others change it, and the file doesn't hold how.
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_adapter_config(folder: Path, adapted: Collection[str]) -> Any:
    """The peft.LoraConfig of an adapter folder; adapted: the modules that its tensors belong to. ConfigError that names the field for a kind of
    adapter that this is not.
    """
    import peft  # here, because it takes seconds

    path = folder / ADAPTER_CONFIG
    raw = read_object(path)
    fields = fields_of(raw, HonouredFields, str(path))
    for name in ("rank_pattern", "alpha_pattern"):
        if not all(key.replace(".", "").isidentifier() for key in fields.get(name) or {}):
            raise ConfigError(f"{path}: {name} has an expression for a key: only plain names of modules are taken here")
    for name, value in raw.items():
        if name == "init_lora_weights":
            if not isinstance(value, str | bool | None) or value not in HARMLESS_STARTS:
                raise ConfigError(
                    f"{path}: init_lora_weights {value!r:.40} changes the base's weights, which are not in the folder: convert it to a plain "
                    "adapter with peft (save_pretrained, path_initial_model_for_weight_conversion)"
                )
        elif name not in (*HonouredFields.__annotations__, *INDIFFERENT) and value and value != PLAIN.get(name):
            raise ConfigError(
                f"{path}: {name} is {value!r:.60}, but only plain LoRA is built here: merge it with peft first"
            )
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    if isinstance(given["target_modules"], str) or any(given.get(name) not in (None, [], "") for name in PATTERNS):
        given = {name: value for name, value in given.items() if name not in PATTERNS}
        given["target_modules"] = sorted(adapted)
    try:
        return peft.LoraConfig(**given, init_lora_weights="gaussian")  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}: {COPY_AGAIN}") from None
