"""Measure: `python bench.py load` (host memory while a checkpoint loads). One table, and the same as JSON with --json FILE.

python bench.py load                              a full-size folder with random weights (15 GB of disk, 16 GB of memory)
python bench.py load --checkpoint FOLDER          a folder of yours
"""

import json

import tyro

from config import WORKSPACE, BenchConfig
from prismatic.errors import exit_codes
from prismatic.hub import resolve


def main(cfg: BenchConfig) -> None:
    from prismatic.bench import load

    rows = load.run(resolve(cfg.checkpoint) if cfg.checkpoint else None, WORKSPACE)
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")
    if cfg.json:
        cfg.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    with exit_codes():
        main(tyro.cli(BenchConfig, description=__doc__, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
