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
TASK_IDS = next(field for field in dataclasses.fields(config.EvalConfig) if field.name == "task_ids")
BAD_FLOATS = (float("nan"), float("inf"), float("-inf"))
TOO_LARGE = 2**64
BAD_NAMES = (
    "../x",
    "a/b",
    "/abs",
    "..",
    ".hidden",
    "a\0b",
    "a\nb",
    "a\\b",
    "x" * 300,
    "\udc80",
    "~nobody-of-that-name",
)
GOOD_NAMES = ("a", "libero_spatial_no_noops", "lr 5e-4", "v1.2+x", "naïve", "")
PLACES = (
    "run_root_dir",
    "cache_dir",
    "local_log_dir",
    "lora_checkpoint",
    "output",
    "vla_path",
    "pretrained_checkpoint",
)


def fields(kind: type) -> list[tuple[str, dataclasses.Field[Any]]]:
    """(script, field) of every field whose default is such a value."""
    return [
        (script, field)
        for script, cfg in CONFIGS.items()
        for field in dataclasses.fields(cfg)
        if type(getattr(cfg, field.name)) is kind
    ]


def refused(script: str, **values: Any) -> str:
    with pytest.raises(ConfigError) as error:
        checked(dataclasses.replace(CONFIGS[script], **values))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("script", CONFIGS)
def test_the_defaults_are_within_their_limits(script: str) -> None:
    assert checked(CONFIGS[script]) == CONFIGS[script]


@pytest.mark.parametrize(("script", "field"), fields(float), ids=lambda x: getattr(x, "name", x))
@pytest.mark.parametrize("value", BAD_FLOATS)
def test_no_float_is_nan_or_infinite(script: str, field: Any, value: float) -> None:
    assert f"--{field.name}" in refused(script, **{field.name: value})


@pytest.mark.parametrize(
    ("script", "field"), [*fields(int), ("eval", TASK_IDS), ("collect", TASK_IDS)], ids=lambda x: getattr(x, "name", x)
)
@pytest.mark.parametrize("value", [-(2**63), TOO_LARGE])
def test_every_whole_number_has_limits(script: str, field: Any, value: int) -> None:
    assert f"--{field.name}" in refused(script, **{field.name: (value,) if field is TASK_IDS else value})


@pytest.mark.parametrize(
    ("script", "flag"), [("finetune", "seed"), ("eval", "seed"), ("eval", "env_seed"), ("collect", "seed")]
)
def test_a_seed_is_one_that_the_generators_take(script: str, flag: str) -> None:
    refused(script, **{flag: 2**32})
    refused(script, **{flag: -1})
    assert getattr(checked(dataclasses.replace(CONFIGS[script], **{flag: 2**32 - 1})), flag) == 2**32 - 1


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_leaves_its_folder_is_refused(name: str) -> None:
    for script in ("finetune", "eval"):
        assert "--run_id_note" in refused(script, run_id_note=name)
    if not name.startswith("~"):
        with pytest.raises(ConfigError, match="--dataset_name"):
            check_folder_name(name, "--dataset_name")


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_usual_name_is_taken(name: str) -> None:
    assert checked(dataclasses.replace(CONFIGS["finetune"], run_id_note=name)).run_id_note == name
    assert not name or check_folder_name(name, "--dataset_name") == name


@pytest.mark.parametrize(
    ("script", "flag"), [(script, flag) for script, cfg in CONFIGS.items() for flag in PLACES if hasattr(cfg, flag)]
)
def test_a_tilde_is_the_home_folder(script: str, flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
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


def test_a_value_of_another_type_is_refused() -> None:
    refused("finetune", batch_size="16")
    refused("finetune", log_to="nothing")
    refused("finetune", run_root_dir=3)
    refused("collect", num_workers=-1)
