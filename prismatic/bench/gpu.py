"""Everything that a rented GPU can tell, within minutes: `python bench.py gpu --out FOLDER [--minutes 10]`.

Each row runs in a process of its own (gpu_rows.py) with a timeout of its own, the most telling first; what it measures is a JSON line in
FOLDER/rows.jsonl, flushed as it comes, and at the end (also of Ctrl-C) FOLDER/table.md holds whatever there is. Needs torch, transformers, timm
and peft; what else is missing is taken from a folder of wheels (--wheels). Without a GPU the rows run on the CPU with the small model, as a check.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prismatic.atomic import append_line
from prismatic.errors import ConfigError, exit_codes

REPOSITORY = Path(__file__).parents[2]
ROWS = {  # name → seconds that it may take on an H100, a start of about 15 included
    "environment": 120, "equal": 120, "products": 120,
    "act plain": 60, "act eager": 60, "act compiled": 300, "act plain compiled": 240, "profile": 90,
    "train plain 1": 60, "train ours 1": 60, "train plain 4": 60, "train ours 4": 60, "train compiled 4": 150, "train plain 8": 60,
    "train ours 8": 60, "train compiled 1": 150, "train compiled 8": 150,
    "act int8": 240, "act int4": 240, "act batch 8": 150, "act batch 16": 150, "act batch 32": 150, "act OFT chunk": 150,
    "train NF4 1": 90, "finetune": 240,
}  # fmt: skip
NEEDED = ("timm", "peft", "transformers", "safetensors", "msgspec", "tqdm", "PIL")  # modules, beside torch and numpy
# modules of the rows finetune, which is left out without them, and NF4, which fails
USED = ("tyro", "docstring_parser", "typeguard", "typing_extensions", "simplejpeg", "bitsandbytes")
PACKAGES = {"PIL": "pillow"}  # where a package is not called as its module
LINES, TABLE, LOGS, INSTALLED, COMPILED = "rows.jsonl", "table.md", "logs", "packages", "inductor"


def main(arguments: Sequence[str]) -> int:
    """Run the rows; 0 if all of them ran, 1 if one failed or was left out, 2 for wrong arguments."""
    with exit_codes():
        options = _parse(arguments)
        (options.out / LOGS).mkdir(parents=True, exist_ok=True)
        environment, lines = _environment(options), (options.out / LINES).resolve()
        # of an earlier call; what runs again replaces it
        there = lines.read_text().splitlines() if lines.exists() else []
        lines.write_text("".join(f"{line}\n" for line in there if json.loads(line)["row"] not in options.rows))
        end, ran = time.monotonic() + 60 * options.minutes, []
        try:
            for name in options.rows:
                ended = _run(name, lines, environment, min(ROWS[name], end - time.monotonic()))
                append_line(lines, json.dumps({"row": name, **ended}).encode())
                ran.append(ended["status"] == "ok")
        finally:
            text = "\n".join(table([json.loads(line) for line in lines.read_text().splitlines()])) + "\n"
            (options.out / TABLE).write_text(text)
            print(text, end="")
        return int(not all(ran))
    return 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Flags, without tyro, which a rented machine may lack."""
    parser = argparse.ArgumentParser(prog="bench.py gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows.jsonl, table.md and logs")
    parser.add_argument("--minutes", type=float, default=10.0, help="no row starts, and none goes on, after that")
    only = "only these rows, such as: environment 'act plain'"
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS), help=only)
    wheels = "folder of wheels from which missing packages are installed into --out"
    parser.add_argument("--wheels", type=Path, help=wheels)
    parser.add_argument("--memory_cap_gib", type=float, default=22.0, help="GPU memory that training may take, GiB")
    parser.add_argument("--data_root_dir", type=Path, help="folder of data sets for the row finetune")
    parser.add_argument("--dataset_name", default="libero_spatial_no_noops", help="data set in it")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < float("inf") or not 0 < options.memory_cap_gib < float("inf"):
        raise ConfigError("--minutes and --memory_cap_gib must be numbers above 0")
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a file: give the name of a folder")
    if options.wheels and not options.wheels.is_dir():
        raise ConfigError(f"--wheels {options.wheels} is no folder: give the one that holds the wheels")
    return options


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """What the rows' processes run with: packages out of the wheels, compiled code kept from row to row. ConfigError for a missing package."""
    installed = (options.out / INSTALLED).resolve()
    for module in NEEDED + USED:
        if importlib.util.find_spec(module) or (installed / module).exists():
            continue
        package = PACKAGES.get(module, module)
        if module in USED and not (options.wheels and [*options.wheels.glob(f"{package}-*.whl")]):
            continue
        if options.wheels is None:
            raise ConfigError(
                f"{package} is not installed: install it, or give a folder that holds its wheel as --wheels"
            )
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--find-links", str(options.wheels), "--target", str(installed), package]
        if subprocess.run(command).returncode:
            raise ConfigError(f"{package} can't be installed from --wheels {options.wheels}: put its wheel there")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), str(installed), os.environ.get("PYTHONPATH")))),
        "TORCHINDUCTOR_CACHE_DIR": str((options.out / COMPILED).resolve()),
        "MEMORY_CAP_GIB": str(options.memory_cap_gib),
        "DATASET_NAME": options.dataset_name,
        "DATA_ROOT_DIR": str(options.data_root_dir.resolve()) if options.data_root_dir else "",
    }


def _run(name: str, lines: Path, environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """One row in its own process group, which adds to lines what it measures → how it ended: status, seconds, reason."""
    if seconds <= 0:
        return {"status": "left out", "reason": "--minutes were over"}
    print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
    log, began = lines.parent / LOGS / f"{name.replace(' ', '-')}.log", time.monotonic()
    command = [sys.executable, "-m", "prismatic.bench.gpu_rows", name, str(lines)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=REPOSITORY, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"status": "timeout", "reason": f"not done after {seconds:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started too: compilers
            process.wait()
    if code:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        return {"status": "failed", "reason": last[0] if last else f"exit code {code}"}
    return {"status": "ok", "seconds": round(time.monotonic() - began, 1)}


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows as Markdown, a line each; of a row that ended well only what it measured."""
    yield "| row | measured |\n|---|---|"
    for row in rows:
        if row.get("status") != "ok":
            facts = (f"{name} {value}" for name, value in row.items() if name != "row" and value != "")
            yield f"| {row['row']} | " + ", ".join(facts).replace("|", "/") + " |"
