"""Who may import whom: the rooms of the README's picture. A test that fails here means that a line stands in the wrong room."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = sorted(REPOSITORY.glob("*.py"))
PACKAGE = sorted((REPOSITORY / "prismatic").rglob("*.py"))
SIMULATOR_ROOMS = {"simulator.py", "expert.py", "suites.py"}
WAIST = ("image", "normalize", "processor")


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Full names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def roots(path: Path, **how: bool) -> set[str]:
    return {name.split(".")[0] for name in imports(path, **how)}


def test_the_top_level_is_the_users() -> None:
    for name in (
        "finetune.py", "eval.py", "config.py", "prismatic", "action_tokenizer.py", "requirements.txt", "rollouts", "README.md", "tests",
    ):  # fmt: skip
        assert (REPOSITORY / name).exists(), name


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_the_package_never_sees_the_scripts(path: Path) -> None:
    assert not roots(path) & {script.stem for script in SCRIPTS if script.name != "action_tokenizer.py"}


def test_action_tokenizer_needs_numpy_only() -> None:
    assert roots(REPOSITORY / "action_tokenizer.py") == {"numpy"}


def test_config_holds_values_and_builds_nothing() -> None:
    assert {name for name in imports(REPOSITORY / "config.py") if name.startswith("prismatic")} <= {"prismatic.image"}


@pytest.mark.parametrize("path", [*SCRIPTS, *PACKAGE], ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_each_library_has_its_room(path: Path) -> None:
    found = roots(path)
    if path.name != "rlds.py":
        assert not found & {"tensorflow", "tensorflow_datasets"}
    assert not roots(path, top_level_only=True) & {"tensorflow", "tensorflow_datasets", "libero", "robosuite", "mujoco"}
    if path.name not in SIMULATOR_ROOMS:
        assert not found & {"libero", "robosuite", "mujoco"}
    if path.parent.name == "models":
        assert not any(
            name.startswith(("prismatic.data", "prismatic.simulator", "prismatic.policy")) for name in imports(path)
        )


def test_the_waist_is_the_only_way_to_a_pixel_or_an_action() -> None:
    for path in (REPOSITORY / "finetune.py", REPOSITORY / "eval.py", REPOSITORY / "prismatic" / "policy.py"):
        assert not {"prismatic.normalize", "action_tokenizer"} & set(imports(path)), path


def test_nothing_downloads_or_runs_foreign_code() -> None:
    for path in [*SCRIPTS, *PACKAGE]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", path
                assert not (node.arg == "shell" and getattr(node.value, "value", None) is True), path
                assert not (node.arg == "allow_pickle" and getattr(node.value, "value", None) is True), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(
                    k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords
                ), path


def test_sizes() -> None:
    files = [path for path in [*SCRIPTS, *PACKAGE] if path.stat().st_size]
    lengths = sorted(len(path.read_text().splitlines()) for path in files)
    assert lengths[-1] <= 350 and lengths[len(lengths) // 2] <= 150
    for path in files:
        assert not any(word in path.stem for word in ("util", "helper", "common", "misc", "manager"))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path}: {node.name}"
