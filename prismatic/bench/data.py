"""Data at the real size: an RLDS set as large as LIBERO-Spatial is written, read into the frame cache, and loaded by 0, 1, … processes.

In: numbers of episodes and frames. Out: a table of seconds, sizes, frames a second, and what the training process and its loader hold over an
epoch. The pictures are drawn (gradients, shapes and noise, as hard to compress as the simulator's), two cameras, 256 × 256.
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.augmentation import drawing
from prismatic.data.examples import DrawBatches, Examples
from prismatic.data.frames import FrameCache, Mixture
from prismatic.data.loader import batches
from prismatic.data.rlds import build_cache, find_dataset, stage_episode, write_dataset
from prismatic.errors import ConfigError
from prismatic.image import AUGMENTATIONS, encode_jpeg
from prismatic.machine import resident_with_children
from prismatic.models.tiny import tiny_tokenizer
from prismatic.models.vla import VLAConfig
from prismatic.processor import Processor, ProcessorConfig

NAME = "drawn"
SIDE = 256  # pixels
PICTURES = 256  # that are drawn; each step's is one of them, and its JPEG is stored anew
BATCH = 16
TIMED_FRAMES = 512  # for each number of loader processes
FEWEST = 4 * BATCH
EARLY, LATE = 0.1, 1.0  # parts of a row at which memory is read: flat, if both are alike
INSTRUCTION = "pick up the black bowl between the plate and the ramekin and place it on the plate"


def drawn_pictures(seed: int = 0) -> list[bytes]:
    """PICTURES different JPEGs of about 15 kB, LIBERO's size."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    jpegs = []
    for _ in range(PICTURES):
        slope = rng.uniform(-0.4, 0.4, (3, 2))
        frame = rng.uniform(60, 190, 3) + slope[:, 0] * (x[..., None] - 128) + slope[:, 1] * (y[..., None] - 128)
        for _ in range(12):
            (cy, cx), radius = rng.uniform(0, SIDE, 2), rng.uniform(8, 40)
            frame[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = rng.uniform(0, 255, 3)
        frame += rng.normal(0, 4, frame.shape)
        jpegs.append(encode_jpeg(frame.clip(0, 255).astype(np.uint8)))
    return jpegs


def stage(folder: Path, *, episodes: int, frames: int, seed: int = 0) -> None:
    """Staged episodes that share the frames out evenly."""
    pictures, rng = drawn_pictures(seed), np.random.default_rng(seed)
    lengths = [frames // episodes + (number < frames % episodes) for number in range(episodes)]
    for number, length in enumerate(lengths):
        action = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
        stage_episode(
            folder / f"episode_{number:05d}.npz",
            images=[pictures[i] for i in rng.integers(PICTURES, size=length)],
            wrist_images=[pictures[i] for i in rng.integers(PICTURES, size=length)],
            state=rng.normal(size=(length, 8)).astype(np.float32),
            joint_state=rng.normal(size=(length, 7)).astype(np.float32),
            action=action,
            instruction=INSTRUCTION,
            file_path=f"drawn_{number}",
        )


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def loading(mixture: Mixture, processor: Processor, workers: int, frames: int) -> Iterator[int]:
    """Frames loaded so far, batch by batch, with full augmentation, as in training."""
    examples = Examples(mixture, processor, augment=drawing(AUGMENTATIONS), seed=0)
    stream = batches(examples, DrawBatches(batch_size=BATCH), num_workers=workers, pin_memory=False)
    for number in range(1, frames // BATCH + 1):
        next(stream)
        yield number * BATCH


def loader_row(mixture: Mixture, processor: Processor, workers: int, frames: int) -> dict[str, Any]:
    """Frames a second once the processes run, and the memory of this process and the loader's, early and late."""
    start, held = 0.0, {}
    marks = {max(int(frames * part) // BATCH, 1) * BATCH: part for part in (EARLY, LATE)}
    warm = min(BATCH * (2 * workers + 1), frames // 2 // BATCH * BATCH)
    done = 0
    for done in loading(mixture, processor, workers, frames):
        if done == warm:
            start = time.perf_counter()
        if done in marks:
            held[marks[done]] = resident_with_children()
    rate = (done - warm) / (time.perf_counter() - start)
    return row(f"load with {workers} processes", frames=done, rate=rate, memory=held)


def row(
    what: str, *, frames: int, rate: float, size: int = 0, memory: Mapping[float, int] | None = None
) -> dict[str, Any]:
    return {
        "what": what,
        "frames": frames,
        "seconds": round(frames / rate, 1),
        "frames/s": round(rate),
        "GB": round(size / 1e9, 2) if size else "",
        **{f"RssAnon MiB at {part:.0%}": round(memory[part] / 2**20) if memory else "" for part in (EARLY, LATE)},
    }


def run(
    folder: Path, *, episodes: int, frames: int, workers: Sequence[int], loaded: int | None = None
) -> list[dict[str, Any]]:
    """The table; folder is made and deleted. What is written through a child process says so by its time, not its memory.

    loaded: frames of the last row, which shows memory; None: an epoch. ConfigError for fewer frames than can be timed.
    """
    if min(frames, loaded or frames) < FEWEST:
        raise ConfigError(f"{min(frames, loaded or frames)} frames are too few to time a loader: give {FEWEST} or more")
    folder.mkdir(parents=True)
    try:
        rows = []
        start = time.perf_counter()
        stage(folder / "staged", episodes=episodes, frames=frames)
        write_dataset(folder / "staged", folder / "rlds", NAME)
        rate = frames / (time.perf_counter() - start)
        shutil.rmtree(folder / "staged")
        source = find_dataset(folder / "rlds", NAME)
        rows.append(row("write as RLDS", frames=frames, rate=rate, size=folder_bytes(source)))
        start = time.perf_counter()
        cache = build_cache(source, folder / "cache")
        rate = frames / (time.perf_counter() - start)
        rows.append(row("read into the cache", frames=frames, rate=rate, size=folder_bytes(cache)))
        mixture = Mixture([FrameCache(cache)], seed=0)
        config = ProcessorConfig.for_model(VLAConfig(), unnorm_key=NAME, center_crop=True)
        processor = Processor(config, tiny_tokenizer([INSTRUCTION]), mixture.statistics)
        for count in workers:
            rows.append(loader_row(mixture, processor, count, min(TIMED_FRAMES, len(mixture))))
        rows.append(loader_row(mixture, processor, max(workers), loaded or len(mixture)))
        rows[-1]["what"] = ("" if loaded else "an epoch, ") + rows[-1]["what"]
        print(f"{os.cpu_count()} cores, openvla-7b's pixels (224), batches of {BATCH}, every augmentation")
        return rows
    finally:
        shutil.rmtree(folder)
