"""Data at the real size: an RLDS set as large as LIBERO-Spatial is written, read into the frame cache, and loaded by 0, 1, … processes.

In: numbers of episodes and frames. Out: a table of seconds, sizes, frames a second, and what the training process and its loader hold over an
epoch. The images are drawn, as hard to compress as the simulator's, two cameras, 256 × 256.
"""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from prismatic.atomic import writing_to
from prismatic.augmentation import drawing
from prismatic.bench.instruments import Row
from prismatic.data.examples import Examples, draw_batches
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
IMAGES = 256  # that are drawn; each step's is one of them, and its JPEG is stored anew
BATCH = 16
TIMED_FRAMES = 512  # for each number of loader processes
FEWEST = 4 * BATCH
PARTS = 0.1, 1.0  # of a row, at which memory is read: flat, if both are alike
INSTRUCTION = "pick up the black bowl between the plate and the ramekin and place it on the plate"


def drawn_images() -> list[bytes]:
    """IMAGES different JPEGs of about 15 kB, LIBERO's size: soft spots with noise on them."""
    rng = np.random.default_rng(0)
    spots = rng.integers(0, 255, (IMAGES, 12, 12, 3)).astype(np.uint8)
    smooth = [np.asarray(Image.fromarray(spot).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for spot in spots]
    return [encode_jpeg((image + rng.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)) for image in smooth]


def stage(folder: Path, *, episodes: int, frames: int) -> None:
    """Staged episodes that share the frames out evenly."""
    images, rng = drawn_images(), np.random.default_rng(0)
    for number in range(episodes):
        length = frames // episodes + (number < frames % episodes)
        views = rng.integers(IMAGES, size=(2, length))
        stage_episode(
            folder / f"episode_{number:05d}.npz",
            images=[images[i] for i in views[0]],
            wrist_images=[images[i] for i in views[1]],
            state=rng.normal(size=(length, 8)).astype(np.float32),
            joint_state=rng.normal(size=(length, 7)).astype(np.float32),
            action=rng.uniform(-1, 1, (length, 7)).astype(np.float32),
            instruction=INSTRUCTION,
            file_path=f"drawn_{number}",
        )


def load(mixture: Mixture, processor: Processor, workers: int, frames: int) -> Row:
    """Frames a second, augmented as in training, once the processes run; memory of this process and the loader's, early and late."""
    examples = Examples(mixture, processor, augment=drawing(AUGMENTATIONS), seed=0)
    stream = batches(examples, draw_batches(batch_size=BATCH), num_workers=workers, pin_memory=False)
    held, start, last = {}, 0.0, frames // BATCH
    warm = min(2 * workers + 1, last // 2)
    for number in range(1, last + 1):
        next(stream)
        if number == warm:
            start = time.perf_counter()
        held |= {part: resident_with_children() for part in PARTS if number == max(int(last * part), 1)}
    rate = (last - warm) * BATCH / (time.perf_counter() - start)
    return row(f"load with {workers} processes", last * BATCH, last * BATCH / rate, memory=held)


def row(
    what: str, frames: int, seconds: float, *, folder: Path | None = None, memory: Mapping[float, int] | None = None
) -> Row:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else 0
    return {
        "what": what,
        "frames": frames,
        "seconds": round(seconds, 1),
        "frames/s": round(frames / seconds),
        "GB": round(size / 1e9, 4) if folder else "",
        **{f"RssAnon MiB at {part:.0%}": round(memory[part] / 2**20) if memory else "" for part in PARTS},
    }


def run(
    folder: Path, *, episodes: int, frames: int, num_workers: Sequence[int], loaded_frames: int | None = None
) -> list[Row]:
    """The table; folder is made and deleted. What is written through a child process says so by its time, not its memory.

    loaded_frames: of the last row, which shows memory; None: an epoch. ConfigError for fewer frames than can be timed.
    """
    if (fewest := min(frames, loaded_frames or frames)) < FEWEST or frames < episodes:
        raise ConfigError(f"{fewest} frames are too few: give {FEWEST} or more, to time a loader, and one an episode")
    with writing_to(folder):
        folder.mkdir(parents=True)
    try:
        start = time.perf_counter()
        stage(folder / "staged", episodes=episodes, frames=frames)
        write_dataset(folder / "staged", folder / "rlds", NAME)
        written = time.perf_counter()
        source = find_dataset(folder / "rlds", NAME)
        cache = build_cache(source, folder / "cache")
        rows = [row("write as RLDS", frames, written - start, folder=source)]
        rows.append(row("read into the cache", frames, time.perf_counter() - written, folder=cache))
        mixture = Mixture([FrameCache(cache)], seed=0)
        config = ProcessorConfig.for_model(VLAConfig(), unnorm_key=NAME, center_crop=True)
        processor = Processor(config, tiny_tokenizer([INSTRUCTION]), mixture.statistics)
        rows += [load(mixture, processor, count, min(TIMED_FRAMES, len(mixture))) for count in num_workers]
        rows.append(load(mixture, processor, max(num_workers), loaded_frames or len(mixture)))
        rows[-1]["what"] = ("" if loaded_frames else "an epoch, ") + rows[-1]["what"]
        print(f"{os.cpu_count()} cores, openvla-7b's pixels (224), batches of {BATCH}, every augmentation")
        return rows
    finally:
        shutil.rmtree(folder)
