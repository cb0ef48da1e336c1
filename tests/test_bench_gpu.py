"""bench.py gpu: every row runs here with the small model; what fails, hangs or is over time costs its own row alone."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from prismatic.bench import gpu, gpu_rows, instruments
from tests.conftest import REPOSITORY

# What a rented machine lacks.
ABSENT = ("tyro", "tensorflow", "torchao", "bitsandbytes", "simplejpeg", "libero", "robosuite", "mujoco")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments, "CPU_BYTES", 10**7)
    monkeypatch.setattr(instruments, "CPU_SIDE", 256)
    monkeypatch.setattr(gpu_rows, "ROUNDS", 1)


def measured(name: str) -> list[dict]:
    torch._dynamo.reset()
    rows = list(gpu_rows.measure(name))
    json.dumps(rows)
    return rows


def test_the_small_model_is_the_same_everywhere() -> None:
    tokens, gradient, compiled, chunk, int8, int4 = measured("equal")
    assert tokens["%"] == compiled["tokens equal to eager, %"] == 100 and compiled["drafts change nothing"]
    assert gradient["value"] < 1e-5 and compiled["decoder"] == "compiled"
    assert chunk["value"] < 1e-4 and chunk["decoder"] == "compiled"
    assert int8["value"] < 1e-4 and int4["value"] < 1e-4


KINDS = {
    re.sub(r" [\d ]+$", "", name): name for name in reversed(gpu.ROWS)
}  # one of the rows that differ in a size alone


@pytest.mark.parametrize("name", [name for name in KINDS.values() if name not in ("equal", "finetune")])
def test_each_row_measures_something(name: str) -> None:
    rows = measured(name)
    numbers = {"act": "p50 ms", "train": "samples/s", "products": "ms", "profile": "kernels", "environment": "GB/s"}
    assert rows[-1][numbers[name.split()[0]]] > 0
    if name == "act OFT chunk":
        assert rows[0]["note"] == "compiled" and rows[0]["forward passes"] == 1
    if name in ("act compiled", "act int8"):
        assert [row["way"] for row in rows] == ["compiled", "right draft"]
        assert rows[1]["forward passes"] == 2 <= rows[0]["forward passes"] and rows[0]["note"] == "compiled"


def test_what_ran_eagerly_is_not_called_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu_rows, "compiler", lambda: broken)
    kept: list[dict] = []
    with pytest.raises(SystemExit, match="not compiled: eager for a batch of 1"):
        kept.extend(gpu_rows.measure("act compiled"))
    assert [row["note"] for row in kept] == ["eager for a batch of 1: no compiler"] * 2


def test_what_could_not_run_is_no_row_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(gpu_rows.infer, "way_of", full)
    kept: list[dict] = []
    with pytest.raises(SystemExit, match="not measured: OutOfMemoryError: no memory"):
        kept.extend(gpu_rows.measure("act compiled"))
    assert [row["p50 ms"] for row in kept] == ["", ""]


def test_what_a_row_can_use_is_installed_from_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "USED", ("drawn_module", "drawn_other"))
    info = "drawn_module-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "drawn_module-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("drawn_module/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: drawn_module\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out), "--wheels", str(tmp_path), "--rows", "environment", "--minutes", "1e-9"]) == 1
    assert (out / gpu.INSTALLED / "drawn_module").is_dir() and not (out / gpu.INSTALLED / "drawn_other").exists()


def test_rows_that_are_not_run_again_stay(tmp_path: Path) -> None:
    kept, again = ({"row": name, "ms": 1} for name in ("products", "environment"))
    (tmp_path / gpu.LINES).write_text("".join(json.dumps(row) + "\n" for row in (kept, again)))
    assert gpu.main(["--out", str(tmp_path), "--rows", "environment", "--minutes", "1e-9"]) == 1
    rows = [json.loads(line) for line in (tmp_path / gpu.LINES).read_text().splitlines()]
    assert rows[0] == kept and [(row["row"], row["status"]) for row in rows[1:]] == [("environment", "left out")]


def test_without_what_it_needs_a_row_says_so() -> None:
    assert measured("finetune") == [{"result": "left out: give a data set with --data_root_dir"}]


def test_the_command_needs_no_more_than_a_rented_machine_has(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "bench.py", "gpu", "--out", str(tmp_path / "out"), "--rows", "environment", "products"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / gpu.LINES).read_text().splitlines()]
    assert [row["row"] for row in rows if row.get("status") == "ok"] == ["environment", "products"]
    assert {row["weights"] for row in rows if "weights" in row} == {"float32", "int8", "int4", "int8, W8A8"}
    assert done.stdout == (tmp_path / "out" / gpu.TABLE).read_text() and "weights int8, rows 6, ms " in done.stdout


def test_a_row_that_fails_hangs_or_comes_too_late_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    room = tmp_path / "room" / "prismatic" / "bench"
    room.mkdir(parents=True)
    (room.parent / "__init__.py").touch()
    (room / "__init__.py").touch()
    (room / "gpu_rows.py").write_text(
        "import sys, time\nname = sys.argv[1]\n"
        'open(sys.argv[2], \'a\').write(f\'{{"row": "{name}", "ms": 1}}\\n\')\n'
        "time.sleep(60 if name == 'products' else 0)\nassert name != 'equal', 'no such kernel'\n"
    )
    monkeypatch.setattr(gpu, "REPOSITORY", tmp_path / "room")
    monkeypatch.setattr(gpu, "ROWS", {"environment": 30, "equal": 30, "products": 3, "profile": 0})
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / gpu.LINES).read_text().splitlines()]
    assert [row["row"] for row in rows if row.get("ms")] == ["environment", "equal", "products"]
    status = {row["row"]: (row["status"], row.get("reason", "")) for row in rows if "status" in row}
    assert status["environment"] == ("ok", "") and status["products"] == ("timeout", "not done after 3 s")
    assert status["equal"] == ("failed", "AssertionError: no such kernel") and status["profile"][0] == "left out"
    assert capsys.readouterr().out.count("\n") == 2 + 3 + 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--minutes", "0"], "--minutes"), (["--rows", "nothing"], "nothing"), (["--wheels", "nowhere"], "--wheels")],
)
def test_wrong_arguments_are_one_sentence(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2 and named in capsys.readouterr().err and not (tmp_path / "out").exists()
