"""What a person sees of a run while it learns: one bar, a row of metrics.jsonl every few steps, the same numbers in a logger.

In: the numbers of each step. Out: <run>/metrics.jsonl, <run>/curves.png, and what open_logger writes.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tqdm import tqdm

from prismatic.errors import ConfigError
from prismatic.machine import resident_with_children
from prismatic.training import curves
from prismatic.training.loggers import Logger, scalars
from prismatic.training.run_folder import RunFolder
from prismatic.training.state import Progress

GIB = 2**30
TRAINING = "finetune"  # what the bar says while nothing else is done
SHORT_NAMES = {"loss": "loss", "action_accuracy": "acc", "l1_loss": "l1"}  # in the bar


def memory() -> dict[str, float]:
    """GiB; the scarcest first. gpu: what torch has reserved, where there is one; ram: of this process and its loader's workers."""
    gpu = {"gpu": torch.cuda.memory_reserved() / GIB} if torch.cuda.is_available() else {}
    return gpu | {"ram": resident_with_children() / GIB}


class Display:
    """`with Display(…) as display:` the bar of the run's steps. Time spent in `paused` doesn't count in samples/s. shown: the main process's."""

    def __init__(
        self, run: RunFolder, logger: Logger, progress: Progress, *, max_steps: int, log_steps: int, shown: bool = True
    ) -> None:
        self.run, self.logger, self.progress = run, logger, progress
        self.max_steps, self.log_steps, self.shown = max_steps, log_steps, shown
        self.bar = tqdm(
            initial=progress.step, total=max_steps, unit="step", desc=TRAINING, smoothing=0.05, disable=not shown
        )
        self._logged, self._since = progress.step, time.monotonic()

    def step(self, numbers: Mapping[str, float], validated: Mapping[str, Any]) -> None:
        """After a step: the bar, and where it is due, or where there are validation's numbers, a row."""
        if not self.shown:
            return
        done, gib = self.progress.step, memory()
        speed = (done - self._logged) * self.progress.effective_batch / max(time.monotonic() - self._since, 1e-9)
        fields = {short: f"{numbers[name]:.3f}" for name, short in SHORT_NAMES.items() if name in numbers}
        scarcest, size = next(iter(gib.items()))
        self.bar.set_postfix(fields | {"samples/s": f"{speed:.3g}", scarcest: f"{size:.2f}GiB"}, refresh=False)
        self.bar.update(done - self.bar.n)
        if done % self.log_steps == 0 or done == self.max_steps or validated:
            rates = {"learning_rate": self.progress.learning_rate, "samples_per_second": round(speed, 3)}
            memories = {f"{name}_gib": round(value, 3) for name, value in gib.items()}
            row = {"step": done, **numbers, **rates, **memories, **validated}
            self.run.log(row)
            self.logger.log(done, scalars(row))
            self._logged, self._since = done, time.monotonic()  # samples/s is of the steps since the last row
        if validated:
            values = (f"{name.removeprefix('val_')} {v:.4f}" for name, v in validated.items() if isinstance(v, float))
            self.say(f"step {done}, {validated['val_frames']} held-out frames: {', '.join(values)}")

    @contextlib.contextmanager
    def paused(self, doing: str) -> Iterator[None]:
        """While something else than learning happens, the bar says what."""
        began = time.monotonic()
        self.bar.set_description(doing)
        try:
            yield
        finally:
            self.bar.set_description(TRAINING, refresh=False)
            self._since += time.monotonic() - began

    def draw_curves(self) -> None:
        """Refresh curves.png; a disk that is full is no reason to end a run."""
        if self.shown:
            try:
                curves.draw(self.run.path)
            except ConfigError as error:
                self.say(f"notice: {error}")

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self.shown:
            self.bar.write(line)

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        self.logger.close()
