"""README and docs: each flag exists, each link leads somewhere, each file of the tree is there, and the core has the length that is said."""

import dataclasses
import functools
import importlib
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.test_architecture import CORE, lines

SCRIPTS = {path.stem for path in REPOSITORY.glob("*.py")} - {"config", "action_tokenizer"}
PAGES = sorted([
    *REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "rollouts" / "README.md",
    *(REPOSITORY / "checkpoints").rglob("README.md"),
])  # fmt: skip
SHELL_FLAGS = {"--quick", "--long", "--fresh", "--oft", "--help"}  # of demo.sh
# of torchrun, pytest, pip and vla-eval: not ours to promise
FOREIGN_FLAGS = {
    "--nproc-per-node",
    "--nnodes",
    "--standalone",
    "-m",
    "--signal",
    "--signals-to-handle",
    "--shutdown-timeout",
    "--no-docker",
    "--render",
    "--index-url",
}


def fields(kind: type) -> Iterator[str]:
    """Names of a configuration's flags; groups inside it give theirs."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        yield from fields(inner) if dataclasses.is_dataclass(inner) and isinstance(inner, type) else [field.name]


@functools.cache
def flags(script: str) -> frozenset[str]:
    """Flags of a script: those of the configurations that stand or are imported there."""
    found = vars(importlib.import_module(script)).items()
    kinds = [kind for name, kind in found if name.endswith("Config") and dataclasses.is_dataclass(kind)]
    # those of bench.py gpu are parsed before tyro is imported
    own = (REPOSITORY / "prismatic/bench/gpu.py").read_text() if script == "bench" else ""
    parsed = set(re.findall(r'add_argument\(\s*"(--\w+)"', own))
    return frozenset(f"--{name}" for kind in kinds for name in fields(kind)) | {"--help"} | parsed  # type: ignore[arg-type]


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(script, its flags) of each command on the page, in code blocks and in the text."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    inside = [line.split(" #")[0] for block in blocks for line in block.splitlines()]
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    for command in [*inside, *spans]:
        found = re.search(r"\b(\w+)\.(?:py|sh)\b(.*)", command)
        if found:
            yield found.group(1), re.findall(r"(?<!\S)--?[a-z][\w-]*", found.group(2))
        else:
            yield "", re.findall(r"(?<!\S)--[a-z][\w-]*", command)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CHANGELOG.md"],  # which names flags that went
    ids=lambda page: str(page.relative_to(REPOSITORY)),
)
def test_each_flag_exists(page: Path) -> None:
    any_script = frozenset().union(*(flags(script) for script in SCRIPTS))
    for script, used in commands(page):
        known = flags(script) if script in SCRIPTS else any_script | SHELL_FLAGS
        assert set(used) <= known | FOREIGN_FLAGS, f"{script or 'in the text'}: no such flag"


@pytest.mark.parametrize(
    "path", [REPOSITORY / "demo.sh", *(REPOSITORY / "checkpoints").glob("train_*.sh")], ids=lambda path: path.name
)
def test_each_flag_of_a_shell_script_exists(path: Path) -> None:
    known = frozenset().union(*map(flags, SCRIPTS)) | SHELL_FLAGS | FOREIGN_FLAGS
    used = set(re.findall(r"(?<!\S)--[a-z][\w-]*(?=[ \"\\\n)])", path.read_text()))
    assert len(used) > 9 and used <= known, f"no such flag: {sorted(used - known)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_each_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            file, _, heading = target.partition("#")
            place = (page.parent / file).resolve() if file else page
            assert place.exists(), target
            if heading:
                titles = re.findall(r"^#+ (.*)$", place.read_text(), re.M)
                assert heading in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, target


def test_each_file_that_a_page_names_is_there() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:prismatic|tests|docs|checkpoints|examples)/[\w/.-]+\.\w+)`", page.read_text()):
            if page.name != "CHANGELOG.md":
                assert (REPOSITORY / name).exists(), f"{page.name}: {name}"


def test_the_core_is_listed_with_its_length() -> None:
    text = (REPOSITORY / "README.md").read_text()
    section = text[text.index("## The core") :]
    tree = re.search(r"```\n(.*?)```", section, re.S)
    said = re.search(r"about ([\d,]+) lines", section)
    assert tree and said
    listed = []
    for line in tree.group(1).splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        if not name.endswith("/"):
            listed.append("prismatic/" * bool(indent) + name)
    there = [name for name in CORE if (REPOSITORY / name).exists()]
    assert sorted(listed) == sorted(there)
    length = sum(lines(REPOSITORY / name) for name in there)
    assert abs(int(said.group(1).replace(",", "")) - length) <= 100, f"the core has {length} lines"


def test_each_page_is_linked_from_the_readme() -> None:
    text = (REPOSITORY / "README.md").read_text()
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text, page.name
