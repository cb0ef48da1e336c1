"""A small frame cache for tests: episodes as dictionaries in, a cache as the one writer makes it out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prismatic.data.frames import FrameCache
from prismatic.data.writer import CacheWriter


def write_cache(folder: Path, episodes: Sequence[dict[str, Any]], *, name: str = "drawn", **how: Any) -> FrameCache:
    """how: of `finish`. episodes: images (and wrist_images) as JPEG bytes, action (T, D), state (T, S) or none, instruction (one, or one a
    step), file_path."""
    folder.mkdir(parents=True)
    views = ["images", "wrist_images"][: 1 + ("wrist_images" in episodes[0])]
    writer = CacheWriter(folder, name=name, views=views)
    for episode in episodes:
        said = episode["instruction"]
        writer.add(
            zip(*(episode[view] for view in views), strict=True),
            action=episode["action"],
            state=episode.get("state"),
            instructions=[said] * len(episode["action"]) if isinstance(said, str) else said,
            file_path=episode.get("file_path", ""),
        )
    writer.finish(**how)
    return FrameCache(folder)
