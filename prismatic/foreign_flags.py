"""Command lines of OpenVLA and OpenVLA-OFT: their flags in, ours out. One that has no meaning here is taken with a line of notice.

A flag stands with its value, `--flag value` or `--flag=value`, as their scripts take them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prismatic.errors import ConfigError

YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Renamed:
    """The same thing under another name, and what else it brings along."""

    name: str
    more: tuple[str, ...] = ()

    def __call__(self, flag: str, value: str) -> list[str]:
        return [f"--{self.name}", value, *self.more]


@dataclass(frozen=True)
class Switch:
    """A flag of true or false that stands for other flags."""

    on: tuple[str, ...] = ()
    off: tuple[str, ...] = ()

    def __call__(self, flag: str, value: str) -> list[str]:
        if value.lower() not in YES + NO:
            raise ConfigError(f"--{flag} {value!r}: give True or False")
        return list(self.on if value.lower() in YES else self.off)


@dataclass(frozen=True)
class Ignored:
    """A flag without a meaning here."""

    reason: str

    def __call__(self, flag: str, value: str) -> list[str]:
        print(f"notice: --{flag} {value} has no effect: {self.reason}")
        return []


@dataclass(frozen=True)
class NotBuilt:
    """A flag that asks for something that isn't there; to switch it off is right."""

    instead: str

    def __call__(self, flag: str, value: str) -> list[str]:
        if value.lower() not in NO:
            raise ConfigError(f"--{flag} {value} is not built here: {self.instead}")
        return []


def _resume(flag: str, value: str) -> list[str]:
    """OpenVLA-OFT's True and False: a run that exists is continued either way, one that doesn't is begun."""
    return ["--resume", "auto" if value.lower() in YES + NO else value]


Table = Mapping[str, Callable[[str, str], list[str]]]

FINETUNE: Table = {
    "save_freq": Renamed("save_steps"),
    "val_freq": Renamed("val_steps"),
    "wandb_log_freq": Renamed("log_steps"),
    "num_steps_before_decay": Renamed("lr_decay_step"),
    "lr_warmup_steps": Renamed("warmup_steps", more=("--warmup_start", "0.1")),
    "use_l1_regression": Switch(on=("--action_head", "l1"), off=("--action_head", "parallel")),
    "use_wandb": Switch(on=("--log_to", "wandb")),
    "use_val_set": Switch(off=("--val_steps", "0")),
    "save_latest_checkpoint_only": Switch(on=("--keep", "1"), off=("--keep", "1000000")),
    "use_diffusion": NotBuilt("train with --action_head l1, which scores as well and answers faster"),
    "use_film": NotBuilt("leave the flag out"),
    "adapter_tmp_dir": Ignored("the adapter is saved in the run's folder; export.py merges it"),
    "merge_lora_during_training": Ignored("the adapter is saved by itself; export.py merges it"),
    "shuffle_buffer_size": Ignored("frames are read in random order from disk"),
    "val_time_limit": Ignored("validation looks at a fixed number of frames"),
    "num_diffusion_steps_train": Ignored("there is no diffusion head"),
    "diffusion_sample_freq": Ignored("there is no diffusion head"),
    "resume": _resume,
    "resume_step": Ignored("a run goes on from its newest checkpoint"),
    "run_id_override": Ignored("give --run_id_note"),
    "model_family": Ignored("there is only OpenVLA"),
    "cuda_graph": Ignored("torch.compile took its place: --compile True"),
}


_FOLDER_SAYS = Ignored("the checkpoint's folder says it")
_RESULTS = Ignored("results are files: results.jsonl, summary.json and report.html")
EVALUATE: Table = {
    **dict.fromkeys(("model_family", "use_l1_regression", "use_proprio", "lora_rank"), _FOLDER_SAYS),
    **dict.fromkeys(("use_wandb", "wandb_project", "wandb_entity", "prefix"), _RESULTS),
    **dict.fromkeys(("initial_states_path", "env_img_res"), Ignored("LIBERO's own states and 256 pixels are used")),
    "num_diffusion_steps_train": FINETUNE["num_diffusion_steps_train"],
    "num_diffusion_steps_inference": FINETUNE["num_diffusion_steps_train"],
    "use_diffusion": NotBuilt("evaluate a checkpoint with another head"),
    "use_film": NotBuilt("evaluate a checkpoint without FiLM"),
}


def translate(arguments: Sequence[str], table: Table) -> list[str]:
    """A script's arguments with the flags of the table replaced; ConfigError for one that is not built, or that has no value."""
    translated, given = [], list(arguments)
    while given:
        argument = given.pop(0)
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not argument.startswith("--") or name not in table:
            translated.append(argument)
            continue
        if not equals:
            if not given or given[0].startswith("--"):
                raise ConfigError(f"{argument} needs a value behind it")
            value = given.pop(0)
        translated += table[name](name, value)
    return translated
