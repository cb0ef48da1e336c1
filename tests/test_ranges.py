"""Flags: each outside its limits is one sentence that names it, before anything starts; ~ is the home folder in every path."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest

import bench
import collect
import config
import doctor
import export
from prismatic.errors import ConfigError
from prismatic.ranges import check_folder_name, checked, expanded

CONFIGS: dict[str, Any] = {
    "finetune": config.FinetuneConfig(),
    "eval": config.EvalConfig(),
    "collect": collect.CollectConfig(),
    "export": export.ExportConfig(checkpoint="folder", output=Path("out")),
    "doctor": doctor.DoctorConfig(),
    **{
        kind.__name__: cast(Any, kind)(**{"checkpoint": "a"} if kind is bench.BenchPrecisionConfig else {})
        for kind in vars(bench).values()
        if isinstance(kind, type) and issubclass(kind, bench.BenchConfig)
    },
}
PLACES = [
    "run_root_dir",
    "cache_dir",
    "local_log_dir",
    "lora_checkpoint",
    "output",
    "vla_path",
    "pretrained_checkpoint",
]
BAD_NAMES = ("../x", "a/b", "/abs", "..", ".hidden", "a\0b", "a\nb", "a\\b", "x" * 300, "\udc80")
GOOD_NAMES = ("a", "libero_spatial_no_noops", "lr 5e-4", "v1.2+x", "naïve")


def refused(script: str, **values: Any) -> str:
    with pytest.raises(ConfigError) as error:
        checked(dataclasses.replace(CONFIGS[script], **values))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("script", CONFIGS)
def test_every_number_has_limits_and_its_default_is_within(script: str) -> None:
    assert checked(CONFIGS[script]) == CONFIGS[script]
    for field in dataclasses.fields(CONFIGS[script]):
        default = getattr(CONFIGS[script], field.name)
        bad: list[Any] = []
        if type(default) is float:
            bad = [
                float("nan"),
                float("inf"),
                float("-inf"),
                1e-320,
                *([1e308] if field.name == "weight_decay" else []),
            ]
        elif type(default) is int:
            bad = [-(2**63), 2**64, 2**32 if "seed" in field.name else 2**64]  # the generators take no larger one
        elif field.name == "task_ids":
            bad = [(-1,), (2**64,)]
        for value in bad:
            assert f"--{field.name}" in refused(script, **{field.name: value})
        if "seed" in field.name:
            checked(dataclasses.replace(CONFIGS[script], **{field.name: 2**32 - 1}))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_leaves_its_folder_is_refused(name: str) -> None:
    for script in ("finetune", "eval"):
        assert "--run_id_note" in refused(script, run_id_note=name)
    with pytest.raises(ConfigError, match="--dataset_name"):
        check_folder_name(name, "--dataset_name")


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_usual_name_is_taken(name: str) -> None:
    assert checked(dataclasses.replace(CONFIGS["finetune"], run_id_note=name)).run_id_note == name
    assert check_folder_name(name, "--dataset_name") == name


@pytest.mark.parametrize("flag", PLACES)
def test_a_tilde_is_the_home_folder(flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for script in (script for script, cfg in CONFIGS.items() if hasattr(cfg, flag)):
        kind = Path if isinstance(getattr(CONFIGS[script], flag), Path | None) else str
        cfg = checked(dataclasses.replace(CONFIGS[script], **{flag: kind("~/there")}))
        assert getattr(cfg, flag) == kind(tmp_path / "there")
        assert f"--{flag}" in refused(script, **{flag: kind("~nobody-of-that-name/x")})


def test_paths_that_no_file_system_takes_are_refused() -> None:
    for path in ("x" * 300, "a/" * 3000, "a\0b", "\udc80"):
        refused("finetune", run_root_dir=Path(path))
        refused("finetune", vla_path=path)
        with pytest.raises(ConfigError):
            expanded(path)


def test_what_no_model_or_simulator_would_end_is_refused() -> None:
    flags = [
        (script, name)
        for script, cfg in CONFIGS.items()
        for name in ("num_actions_chunk", "num_steps_wait")
        if hasattr(cfg, name)
    ]
    assert {name for _, name in flags} == {"num_actions_chunk", "num_steps_wait"}
    for script, name in flags:
        assert f"--{name}" in refused(script, **{name: 1_000_000_000})


def test_a_value_of_another_type_is_refused() -> None:
    refused("finetune", batch_size="16")
    refused("finetune", log_to="nothing")
    refused("finetune", run_root_dir=3)
    refused("collect", num_workers=-1)
    refused("collect", perturbation=1e308)


@pytest.mark.parametrize(
    ("script", "flag"), [("finetune", "vla_path"), ("eval", "unnorm_key"), ("doctor", "checkpoint")]
)
def test_an_empty_text_is_no_value(script: str, flag: str) -> None:
    """As a shell makes it of a variable that is not set."""
    with pytest.raises(ConfigError, match=f"--{flag} is empty"):
        checked(dataclasses.replace(CONFIGS[script], **{flag: ""}))
