"""What of an evaluation's flags can't go together, and which of them its numbers depend on. In: the flags' values. Out: a ConfigError, or facts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismatic.episodes import setup
from prismatic.errors import ConfigError
from prismatic.evaluation import Facts
from prismatic.scene.suites import Benchmark
from prismatic.versions import SIMULATOR_PACKAGES, versions

# What the numbers depend on: always, of a checkpoint, and where it is not at its default.
IDENTITY = ("task_suite_name", "policy", "num_steps_wait", "env_seed", "seed", "render_quality")
OF_A_CHECKPOINT = ("unnorm_key", "center_crop", "load_in_8bit", "load_in_4bit", "deterministic")
SAID_OF_FOREIGN = ("action_head", "num_actions_chunk", "num_images_in_input")
QUANTISATION = 2  # is raised where the same flag makes other weights: 2 leaves the image towers whole, and INT4 is this project's own
WHERE_CHANGED = ("quantize", "instruction", "num_open_loop_steps", *SAID_OF_FOREIGN)


@dataclass(frozen=True)
class Flags:
    """The flags of eval.py that exclude or need each other, under their names."""

    policy: str
    pretrained_checkpoint: str
    lora_checkpoint: Path | None
    load_in_8bit: bool
    load_in_4bit: bool
    quantize: str
    save_gifs: bool
    save_videos: bool
    instruction: str
    open_loop: bool
    env_seed: int
    first_init_state: int


def check(flags: Flags) -> None:
    """What can be said before anything is loaded. ConfigError."""
    given = [name for name in ("load_in_8bit", "load_in_4bit") if getattr(flags, name)]
    given += [f"quantize {flags.quantize}"] * (flags.quantize != "none")
    policy = f"--policy {flags.policy}"
    for wrong, sentence in (
        (
            flags.policy == "checkpoint" and not flags.pretrained_checkpoint,
            "pretrained_checkpoint is not set: --pretrained_checkpoint FOLDER_OR_HUB_ID, or --policy expert",
        ),
        (
            flags.lora_checkpoint and not flags.lora_checkpoint.is_dir(),
            f"lora_checkpoint {flags.lora_checkpoint} is not a folder: --lora_checkpoint FOLDER",
        ),
        (flags.save_gifs and not flags.save_videos, "save_gifs needs the videos: leave out --save_videos False"),
        (len(given) > 1, f"{' and '.join(given)} exclude each other: set one of them"),
        (
            flags.instruction != "keep" and flags.policy != "checkpoint",
            f"--instruction {flags.instruction}: only a checkpoint reads, {policy} doesn't",
        ),
        (flags.open_loop and flags.policy != "checkpoint", f"--open_loop asks a checkpoint: leave out {policy}"),
        (
            flags.policy == "replay" and (flags.env_seed or flags.first_init_state),
            f"{policy} begins where each episode was recorded: leave out env_seed and first_init_state",
        ),
    ):
        if wrong:
            raise ConfigError(sentence)


def identity(
    values: Mapping[str, Any], defaults: Mapping[str, Any], benchmark: Benchmark, *, renderer: str, dataset: str | None
) -> Facts:
    """What the numbers depend on, of all flags' values. Weights count by their content: a folder trained anew is another policy.

    dataset: fingerprint of what is replayed.
    """
    known, suite = versions(), values["task_suite_name"]
    facts: Facts = {name: values[name] for name in IDENTITY}
    if values["policy"] == "checkpoint":
        facts |= {name: setup.weights(values[name]) for name in ("pretrained_checkpoint", "lora_checkpoint")}
        facts |= {name: values[name] for name in OF_A_CHECKPOINT}
        if values["quantize"] != "none" or values["load_in_4bit"]:
            facts["quantisation"] = QUANTISATION  # a folder of before is another policy's
    if values["policy"] == "replay":
        facts["dataset"] = f"{values['dataset_name']}, fingerprint {dataset}"
    facts |= {name: values[name] for name in WHERE_CHANGED if values[name] != defaults[name]}
    facts |= {"step_limit": benchmark.step_limit(suite), "benchmark_files": benchmark.files_fingerprint(suite)}
    return facts | {"renderer": renderer} | {name: known[name] for name in SIMULATOR_PACKAGES}
