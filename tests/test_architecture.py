"""Who may import whom, and how long a file may be: the rooms of the README's picture. What fails here stands in the wrong room."""

import ast
import functools
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, SLOW

SCRIPTS = sorted(REPOSITORY.glob("*.py"))
PACKAGE = sorted((REPOSITORY / "prismatic").rglob("*.py"))
FILES = [*SCRIPTS, *PACKAGE]
SIMULATOR_ROOMS = {"simulator.py", "robosuite_tamed.py", "expert.py", "suites.py"}
# What the README calls the core, in its order. The two scripts call extras; no other file of the core does.
CORE = [
    "config.py", "finetune.py", "eval.py", "action_tokenizer.py",
    *(f"prismatic/data/{name}.py" for name in ("frames", "examples")),
    *(f"prismatic/{name}.py" for name in ("processor", "image", "normalize")),
    *(f"prismatic/models/{name}.py" for name in ("vision", "projector", "llama", "vla", "heads", "decode", "lora")),
    "prismatic/training/step.py",
    *(f"prismatic/{name}.py" for name in ("policy", "simulator", "rollout")),
]  # fmt: skip
# What any file may stand on: these import nothing but each other. Most of them read and check what comes from outside.
LEAVES = tuple(
    f"prismatic.{name}"
    for name in (
        "errors", "filenames", "ranges", "records", "arrays", "image", "meshes", "robosuite_tamed", "policy_inputs", "normalize", "data.cache_files",
    )
)  # fmt: skip
CALLERS = ("finetune.py", "eval.py")
MAX_CORE, MAX_ALL, MAX_FILE, MEDIAN_FILE, MAX_FUNCTION = 2_800, 12_500, 350, 150, 80  # lines

# The debt that is left: the sum of all is missed, and may not grow on the way there.
ALL_TODAY = 18_384


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Full names of the modules that a file imports, inside functions too; `from package import module` is the module."""
    nodes = tree(path).body if top_level_only else ast.walk(tree(path))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)} imports by dots: write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module or ""


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name in MODULES}


def roots(path: Path, **how: bool) -> set[str]:
    return {name.split(".")[0] for name in imports(path, **how)}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_top_level_is_the_users() -> None:
    files = {"finetune.py", "eval.py", "config.py", "action_tokenizer.py", "requirements.txt", "README.md"}
    assert {"prismatic", "rollouts", "tests", *files} <= {path.name for path in REPOSITORY.iterdir()}


def test_the_package_never_sees_the_scripts() -> None:
    scripts = {script.stem for script in SCRIPTS if script.name != "action_tokenizer.py"}
    for path in PACKAGE:
        assert not roots(path) & scripts, name_of(path)
        for node in ast.walk(tree(path)):
            assert getattr(node, "id", getattr(node, "arg", None)) != "cfg", (
                f"{name_of(path)}: the package takes values"
            )


def test_action_tokenizer_needs_numpy_only() -> None:
    assert roots(REPOSITORY / "action_tokenizer.py") == {"numpy"}


def test_config_holds_values_and_builds_nothing() -> None:
    assert ours(REPOSITORY / "config.py") <= {"prismatic.image", *LEAVES}


def test_the_core_imports_no_extra() -> None:
    core = {module_of(REPOSITORY / name) for name in CORE}
    for name in {*CORE} - {*CALLERS}:
        assert not ours(REPOSITORY / name) - core - {*LEAVES}, f"{name}: what it needs of an extra is to be handed in"


def test_the_leaves_import_nothing_but_leaves() -> None:
    for number, name in enumerate(LEAVES):
        assert ours(MODULES[name]) <= {*LEAVES[:number]}, name


def test_no_import_goes_in_a_circle() -> None:
    graphlib.TopologicalSorter({module: ours(path) for module, path in MODULES.items()}).prepare()


def test_each_library_has_its_room() -> None:
    simulators, datasets = {"libero", "robosuite", "mujoco"}, {"tensorflow", "tensorflow_datasets"}
    for path in FILES:
        found, name = roots(path), name_of(path)
        assert path.name == "rlds.py" or not found & datasets, name
        assert path.name in SIMULATOR_ROOMS or not found & simulators, name
        assert not roots(path, top_level_only=True) & (datasets | simulators), name
        if path.parent == REPOSITORY / "prismatic" / "models":
            below = ("prismatic.data", "prismatic.simulator", "prismatic.policy")
            assert not [module for module in ours(path) if module.startswith(below)], name


def test_the_waist_is_the_only_way_to_a_pixel_or_an_action() -> None:
    for path in (REPOSITORY / "finetune.py", REPOSITORY / "eval.py", REPOSITORY / "prismatic" / "policy.py"):
        assert not {"prismatic.normalize", "action_tokenizer"} & set(imports(path)), path


def test_nothing_downloads_or_runs_foreign_code() -> None:
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.keyword):
                switched_on = getattr(node.value, "value", None) is True
                assert node.arg != "trust_remote_code", path
                assert not (node.arg in ("shell", "allow_pickle") and switched_on), path
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in {"pickle.load", "pickle.loads", "pickle.Unpickler"}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(
                    k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords
                ), path


def test_a_file_fits_a_head() -> None:
    for path in FILES:
        assert lines(path) <= MAX_FILE, name_of(path)
        assert not any(word in path.stem for word in ("util", "helper", "common", "misc", "manager"))
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION, f"{name_of(path)}: {node.name}"


def test_the_whole_fits_an_evening_and_a_week() -> None:
    lengths = sorted(lines(path) for path in FILES if path.stat().st_size)
    assert lengths[len(lengths) // 2] <= MEDIAN_FILE
    assert sum(lines(REPOSITORY / name) for name in CORE) <= MAX_CORE
    assert sum(lengths) <= ALL_TODAY
    if sum(lengths) > MAX_ALL:
        pytest.xfail(f"all {sum(lengths)} of {MAX_ALL} lines")


def test_no_machine_and_no_workplace_is_named() -> None:
    kinds = {".py", ".sh", ".md", ".toml", ".txt", ".yml", ".yaml", ".cff", ".jinja", ".css"}
    private = re.compile(r"/(work|root|tmp)/|/home/\w|\bissues (show|stops?|land)\b|(?<!\.\./)\bshared/")
    skipped = {".git", ".venv", "workspace", "rollouts", ".ruff_cache", ".pytest_cache"}
    top = [path for path in REPOSITORY.iterdir() if path.name not in skipped]
    for path in [*top, *(inner for folder in top if folder.is_dir() for inner in folder.rglob("*"))]:
        if path.suffix in kinds and path != Path(__file__).resolve() and path.is_file():
            found = private.search(path.read_text(errors="replace"))
            assert not found, f"{name_of(path)}: {found.group()}"


def test_no_test_stands_on_another_test() -> None:
    for path in Path(__file__).parent.glob("*.py"):
        borrowed = {name for name in imports(path) if name.startswith("tests.test_")} - {"tests.test_architecture"}
        assert not borrowed, f"{path.name}: what two test files need stands in conftest.py or a file of its own"


def test_the_slow_files_are_there() -> None:
    there = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert not {*SLOW} - there, "it was renamed: so must be its name in conftest.py"
