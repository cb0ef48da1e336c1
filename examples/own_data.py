"""Your recordings → a data set that finetune.py reads. Replace `recorded` by a reader of your own; docs/data.md says what numbers must mean.

    python examples/own_data.py --output datasets --dataset_name my_robot                    # drawn demonstrations, one arm
    python examples/own_data.py --output datasets --dataset_name my_arms --action_dim 14     # two arms
    python examples/own_data.py --output datasets --dataset_name mine --recordings FOLDER    # FOLDER/<name>.mp4 + <name>.npz

An .npz holds `action` (T, D), `instruction`, and if you have it `state` (T, S); <name>.mp4 holds T frames, <name>_wrist.mp4 the wrist camera's.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import av
import numpy as np
from av.error import FFmpegError
from msgspec import Meta

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, wherever this is started

from prismatic.arrays import read_arrays
from prismatic.atomic import writing_to
from prismatic.data import lerobot_writer, rlds
from prismatic.data.staging import STAGED, stage_episode
from prismatic.errors import ConfigError, exit_codes
from prismatic.image import encode_jpeg
from prismatic.ranges import Positive, checked, command_line


@dataclass(frozen=True)
class OwnDataConfig:
    # Folder of data sets; the new one is output/dataset_name.
    output: Path
    # Name of the new data set: small letters, digits and _.
    dataset_name: str
    # Folder of your recordings, <name>.mp4 and <name>.npz each. None: draw demonstrations.
    recordings: Path | None = None
    # Format of the new data set.
    format: Literal["lerobot", "rlds"] = "lerobot"
    # Frames and actions a second (both at one rate).
    fps: Annotated[float, Meta(gt=0, le=10000)] = 10.0
    # Of drawn demonstrations: how many numbers an action has. 7: one arm; 14: two.
    action_dim: Positive = 7
    # Drawn demonstrations.
    episodes: Positive = 12


def recorded(folder: Path) -> Iterator[dict[str, Any]]:
    """Your recordings: images as JPEG, upright; gripper as it was recorded."""
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise ConfigError(f"--recordings {folder} holds no <name>.npz: give the folder of your recordings")
    for path in paths:
        try:
            arrays = read_arrays(path)
        except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
            raise ConfigError(f"{path} can't be read ({error}): save it again with numpy.savez") from None
        for name in ("action", "instruction"):
            if name not in arrays:
                raise ConfigError(f"{path} has no {name}, only {', '.join(arrays)}: add it")
        wrist = path.with_name(f"{path.stem}_wrist.mp4")
        videos = {"images": path.with_suffix(".mp4"), **({"wrist_images": wrist} if wrist.is_file() else {})}
        numbers = {name: arrays[name] for name in ("action", "state") if name in arrays}
        yield (
            {name: frames(video) for name, video in videos.items()}
            | numbers
            | {"instruction": said(arrays["instruction"], path)}
        )


def said(instruction: np.ndarray, path: Path) -> str:
    """The one text of an array of one or of equal texts."""
    texts = {text.decode() if isinstance(text, bytes) else text for text in np.ravel(instruction).tolist()}
    if len(texts) != 1 or not isinstance(text := texts.pop(), str):
        raise ConfigError(f"{path}: instruction is no single text: save it with numpy.savez(…, instruction='…')")
    return text


def frames(path: Path) -> list[bytes]:
    """All frames of an mp4, as JPEG: the pixels of a long recording would fill the memory."""
    try:
        with av.open(str(path)) as container:
            found = [
                (encode_jpeg(frame.to_ndarray(format="rgb24")), frame.rotation) for frame in container.decode(video=0)
            ]
    except (FFmpegError, IndexError) as error:
        raise ConfigError(f"{path} can't be decoded ({error}): each <name>.npz needs its video <name>.mp4") from None
    # a telephone's: players turn it as they show it
    if turned := next((rotation for _, rotation in found if rotation), 0):
        raise ConfigError(
            f"{path} is stored turned by {turned}°: make it upright first, such as by `ffmpeg -i IN.mp4 OUT.mp4`"
        )
    return [jpeg for jpeg, _ in found]


def drawn(episodes: int, action_dim: int) -> Iterator[dict[str, Any]]:
    """A square that moves to the right or to the left, as it is told; each arm's gripper (-1 open, +1 close) shuts half-way."""
    for number in range(episodes):
        generator = np.random.default_rng(number)
        side, steps = ("left", "right")[number % 2], int(generator.integers(12, 20))
        speed = (1 if side == "right" else -1) * generator.uniform(0.4, 1.0, size=steps)
        place = 100 + np.cumsum(speed) * 5
        images = np.full((2, steps, 224, 224, 3), 60, dtype=np.uint8)
        for t, x in enumerate(place.astype(int)):
            images[0, t, 90:130, x : x + 40] = (220, 80, 40)
            images[1, t, 60:160, 60:160] = (40, 80 + 5 * t, 200)
        action = 0.1 * generator.normal(size=(steps, action_dim))
        action[:, 0] = speed
        action[:, 6::7] = np.where(np.arange(steps) < steps // 2, -1, 1)[:, None]
        state = np.stack([place, np.arange(steps)], axis=1)
        yield {
            "images": list(map(encode_jpeg, images[0])), "wrist_images": list(map(encode_jpeg, images[1])), "action": action, "state": state,
            "instruction": f"push the block to the {side}",
        }  # fmt: skip


def main(cfg: OwnDataConfig) -> Path:
    """Stage each episode, write the data set, say how to go on."""
    cfg = checked(cfg)
    rlds.check_name(cfg.dataset_name)
    if (collected := cfg.output / (cfg.dataset_name + STAGED)).is_dir():
        raise ConfigError(
            f"{collected} holds the episodes of a data set that collect.py made: give another --dataset_name"
        )
    episodes = recorded(cfg.recordings) if cfg.recordings else drawn(cfg.episodes, cfg.action_dim)
    with writing_to(cfg.output):
        cfg.output.mkdir(parents=True, exist_ok=True)
    widths: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory(prefix=".staged-", dir=cfg.output) as staged:
        for number, episode in enumerate(episodes):
            found = {name: list(np.shape(episode[name])[1:]) for name in ("action", "state") if name in episode}
            if found != (widths := widths or found):
                raise ConfigError(f"recording {number + 1} has vectors of {found}, the first {widths}: give all alike")
            try:
                stage_episode(Path(staged) / f"episode_{number:06d}.npz", **episode)
            except ValueError as error:
                raise ConfigError(
                    f"recording {number + 1}: {error}: give a frame and an action (T, D) a step"
                ) from None
        if cfg.format == "rlds":
            made = rlds.write_dataset(Path(staged), cfg.output, cfg.dataset_name)
        else:
            made = lerobot_writer.write_dataset(Path(staged), cfg.output, cfg.dataset_name, fps=cfg.fps)
    where = f"--data_root_dir {cfg.output} --dataset_name {cfg.dataset_name}"
    print(f"data set: {made}")
    print(f"look:    python doctor.py --simulator False {where}")
    print(f"train:   python finetune.py --vla_path openvla/openvla-7b {where}")
    print(f"check:   python eval.py --open_loop True --pretrained_checkpoint <run>/latest {where}")
    print("act:     python serve.py --pretrained_checkpoint <run>/latest")
    return made


if __name__ == "__main__":
    with exit_codes():
        main(command_line(OwnDataConfig, __doc__))
