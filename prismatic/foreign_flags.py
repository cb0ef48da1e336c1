"""Command lines of OpenVLA and OpenVLA-OFT: their flags in, ours out. One that has no meaning here is taken with a line of notice.

A flag stands with its value, `--flag value` or `--flag=value`, as their scripts take them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from prismatic.errors import ConfigError

YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class Rule(NamedTuple):
    """Our arguments for a flag, {} for its value."""

    any: str | None = None  # for any value, but for those that `on` and `off` name
    on: str | None = None  # where it is true
    off: str | None = None  # where it is false
    notice: str = ""  # why it has no effect
    instead: str = ""  # what to do, as it asks for something that isn't there

    def arguments(self, flag: str, value: str) -> list[str]:
        """ConfigError for a value that is none of a switch, and for what is not built."""
        named = self.on if value.lower() in YES else self.off if value.lower() in NO else None
        text = self.any if named is None else named
        if text is None and self.instead:
            raise ConfigError(f"--{flag} {value} is not built here: {self.instead}")
        if text is None:
            raise ConfigError(f"--{flag} {value!r}: give True or False")
        if self.notice:
            print(f"notice: --{flag} {value} has no effect: {self.notice}")
        return [part.format(value) for part in text.split()]


Table = Mapping[str, Rule]


def _ignored(reason: str) -> Rule:
    return Rule("", notice=reason)


FINETUNE: Table = {
    "save_freq": Rule("--save_steps {}"),
    "val_freq": Rule("--val_steps {}"),
    "wandb_log_freq": Rule("--log_steps {}"),
    "num_steps_before_decay": Rule("--lr_decay_step {}"),
    "lr_warmup_steps": Rule("--warmup_steps {} --warmup_start 0.1"),
    "use_l1_regression": Rule(on="--action_head l1", off="--action_head parallel"),
    "use_wandb": Rule(on="--log_to wandb", off=""),
    "use_val_set": Rule(on="", off="--val_steps 0"),
    "save_latest_checkpoint_only": Rule(on="--keep 1", off="--keep 1000000"),
    "use_diffusion": Rule(off="", instead="train with --action_head l1, which scores as well and answers faster"),
    "use_film": Rule(off="", instead="leave the flag out"),
    "adapter_tmp_dir": _ignored("the adapter is saved in the run's folder; export.py merges it"),
    "merge_lora_during_training": _ignored("the adapter is saved by itself; export.py merges it"),
    "shuffle_buffer_size": _ignored("frames are read in random order from disk"),
    "val_time_limit": _ignored("validation looks at a fixed number of frames"),
    **dict.fromkeys(("num_diffusion_steps_train", "diffusion_sample_freq"), _ignored("there is no diffusion head")),
    # OpenVLA-OFT's True and False: a run that exists is continued either way, one that doesn't is begun
    "resume": Rule("--resume {}", on="--resume auto", off="--resume auto"),
    "resume_step": _ignored(
        "a run goes on from its newest step; from a folder given as --vla_path it begins at 0, so lower --max_steps"
    ),
    "run_id_override": _ignored("give --run_id_note"),
    "model_family": _ignored("there is only OpenVLA"),
    "cuda_graph": _ignored("torch.compile took its place: --compile True"),
}


_FOLDER_SAYS = _ignored("the checkpoint's folder says it")
_RESULTS = _ignored("results are files: results.jsonl, summary.json and report.html")
EVALUATE: Table = {
    **dict.fromkeys(("model_family", "use_l1_regression", "use_proprio", "lora_rank"), _FOLDER_SAYS),
    **dict.fromkeys(("use_wandb", "wandb_project", "wandb_entity", "prefix"), _RESULTS),
    **dict.fromkeys(("initial_states_path", "env_img_res"), _ignored("LIBERO's own states and 256 pixels are used")),
    "num_diffusion_steps_train": FINETUNE["num_diffusion_steps_train"],
    "num_diffusion_steps_inference": FINETUNE["num_diffusion_steps_train"],
    "use_diffusion": Rule(off="", instead="evaluate a checkpoint with another head"),
    "use_film": Rule(off="", instead="evaluate a checkpoint without FiLM"),
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
        translated += table[name].arguments(name, value)
    return translated
