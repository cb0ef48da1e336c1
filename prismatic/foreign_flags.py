"""Command lines of OpenVLA and OpenVLA-OFT: their flags in, ours out. One that has no meaning here is taken with a line of notice.

A flag stands with its value, `--flag value` or `--flag=value`, as their scripts take them.
"""

from collections.abc import Callable, Mapping, Sequence

from prismatic.errors import ConfigError

YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
Translation = Callable[[str, str], Sequence[str]]  # a flag's name and its value → our arguments
Table = Mapping[str, Translation]


def _renamed(name: str, *more: str) -> Translation:
    """The same thing under another name, and what else it brings along."""
    return lambda flag, value: [f"--{name}", value, *more]


def _switch(on: Sequence[str] = (), off: Sequence[str] = ()) -> Translation:
    """A flag of true or false that stands for other flags."""

    def translation(flag: str, value: str) -> Sequence[str]:
        if value.lower() not in YES + NO:
            raise ConfigError(f"--{flag} {value!r}: give True or False")
        return on if value.lower() in YES else off

    return translation


def _ignored(reason: str) -> Translation:
    """A flag without a meaning here."""
    return lambda flag, value: print(f"notice: --{flag} {value} has no effect: {reason}") or []


def _not_built(instead: str) -> Translation:
    """A flag that asks for something that isn't there; to switch it off is right."""

    def translation(flag: str, value: str) -> Sequence[str]:
        if value.lower() not in NO:
            raise ConfigError(f"--{flag} {value} is not built here: {instead}")
        return []

    return translation


def _resume(flag: str, value: str) -> Sequence[str]:
    """OpenVLA-OFT's True and False: a run that exists is continued either way, one that doesn't is begun."""
    return ["--resume", "auto" if value.lower() in YES + NO else value]


FINETUNE: Table = {
    "save_freq": _renamed("save_steps"),
    "val_freq": _renamed("val_steps"),
    "wandb_log_freq": _renamed("log_steps"),
    "num_steps_before_decay": _renamed("lr_decay_step"),
    "lr_warmup_steps": _renamed("warmup_steps", "--warmup_start", "0.1"),
    "use_l1_regression": _switch(on=("--action_head", "l1"), off=("--action_head", "parallel")),
    "use_wandb": _switch(on=("--log_to", "wandb")),
    "use_val_set": _switch(off=("--val_steps", "0")),
    "save_latest_checkpoint_only": _switch(on=("--keep", "1"), off=("--keep", "1000000")),
    "use_diffusion": _not_built("train with --action_head l1, which scores as well and answers faster"),
    "use_film": _not_built("leave the flag out"),
    "adapter_tmp_dir": _ignored("the adapter is saved in the run's folder; export.py merges it"),
    "merge_lora_during_training": _ignored("the adapter is saved by itself; export.py merges it"),
    "shuffle_buffer_size": _ignored("frames are read in random order from disk"),
    "val_time_limit": _ignored("validation looks at a fixed number of frames"),
    "num_diffusion_steps_train": _ignored("there is no diffusion head"),
    "diffusion_sample_freq": _ignored("there is no diffusion head"),
    "resume": _resume,
    "resume_step": _ignored("a run goes on from its newest checkpoint"),
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
    "use_diffusion": _not_built("evaluate a checkpoint with another head"),
    "use_film": _not_built("evaluate a checkpoint without FiLM"),
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
