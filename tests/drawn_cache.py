"""A small frame cache for tests: episodes as dictionaries in, the cache's three files out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.data.frames import CACHE_FORMAT, FrameCache


def write_cache(folder: Path, episodes: Sequence[dict[str, Any]], *, train_episodes: int | None = None) -> FrameCache:
    """episodes: images (and wrist_images) as JPEG bytes, action (T, 7) in LIBERO's convention, state (T, 8), instruction, file_path."""
    folder.mkdir(parents=True)
    views = ["images", "wrist_images"] if "wrist_images" in episodes[0] else ["images"]
    jpegs = [jpeg for episode in episodes for both in zip(*map(episode.get, views), strict=True) for jpeg in both]  # type: ignore[arg-type]
    lengths = [len(episode["action"]) for episode in episodes]
    words = sorted({episode["instruction"] for episode in episodes})
    (folder / "frames.bin").write_bytes(b"".join(jpegs))
    np.savez(
        folder / "steps.npz",
        offsets=np.cumsum([0, *map(len, jpegs)]),
        action=np.concatenate([episode["action"] for episode in episodes]).astype(np.float32),
        state=np.concatenate([episode["state"] for episode in episodes]).astype(np.float32),
        episode=np.repeat(np.arange(len(episodes), dtype=np.int32), lengths),
        timestep=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        instruction=np.repeat([words.index(episode["instruction"]) for episode in episodes], lengths).astype(np.int32),
    )
    meta = {
        "format": CACHE_FORMAT,
        "name": "drawn",
        "fingerprint": "of drawn",
        "train_episodes": train_episodes,
        "images": views,
        "instructions": words,
        "file_paths": [episode["file_path"] for episode in episodes],
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return FrameCache(folder)
