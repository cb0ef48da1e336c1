"""What each way to draw costs and changes, on this machine: the table in docs/evaluate.md.

python docs/rendering.py [TASK]      (of LIBERO-Spatial; CPU time of one process)
"""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from prismatic.scene.renderer import choose_renderer
from prismatic.scene.suites import Libero

FRAMES = 10  # of each camera
WAYS = {"standard": "standard", "fast, all triangles": "fast", "fast": "fast"}


def milliseconds(draw: Callable[[], object]) -> float:
    draw()  # the first one makes the renderer
    start = time.process_time()
    for _ in range(FRAMES):
        draw()
    return (time.process_time() - start) / FRAMES * 1e3


def main(task_id: int) -> None:
    choose_renderer()
    reference = None
    print(
        "| way | front ms | wrist ms | reset and first frame s | change of 255: front, wrist |\n|---|---|---|---|---|"
    )
    for way, quality in WAYS.items():
        whole = mock.patch("prismatic.simulator.fewer_triangles", lambda model: contextlib.nullcontext())
        with whole if "all" in way else contextlib.nullcontext():
            sim = Libero().simulator("libero_spatial", task_id, quality=quality)
            sim.reset(0)
            front, wrist = milliseconds(sim.frame), milliseconds(sim.wrist)
            views = [sim.frame().astype(int), sim.wrist().astype(int)]
            reference = reference or views
            start = time.process_time()
            sim.reset(0, settle=0)
            sim.frame()
            again = time.process_time() - start
            sim.close()
        changes = [np.abs(view - seen).mean() for view, seen in zip(views, reference, strict=True)]
        print(f"| {way} | {front:.0f} | {wrist:.0f} | {again:.1f} | {changes[0]:.2f}, {changes[1]:.2f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
