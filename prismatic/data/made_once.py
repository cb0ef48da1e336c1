"""Folders that are made once, whole or not at all: frame caches, and data sets of staged episodes.

Of several processes that want one, the first makes it; the others wait and take it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prismatic.atomic import sweep, whole_folder, writing_to
from prismatic.data.cache_files import CACHE_FORMAT
from prismatic.data.dataset_folder import listing
from prismatic.errors import ConfigError
from prismatic.filenames import CACHE_META, STAGED_NOTE


def cached(cache_dir: Path, name: str, identity: Any, fill: Callable[[Path], None]) -> Path:
    """The folder `cache_dir/name-<key of identity>`, filled by `fill` where it isn't there yet. identity: JSON-ready, what the content depends on."""
    cache_dir = Path(cache_dir).absolute()
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, identity]).encode()).hexdigest()
    cache = cache_dir / f"{name}-{key[:12]}"
    if not (cache / CACHE_META).is_file():
        with _alone_in(cache_dir):
            sweep(cache_dir)
            if not (cache / CACHE_META).is_file():
                with whole_folder(cache) as folder:
                    fill(folder)
    return cache


def made_of_staged(
    episodes: Path, target: Path, fill: Callable[[Path, Sequence[Path]], None], *, fps: float | None = None
) -> Path:
    """The data set `target` of a folder's staged episodes, made by `fill` (folder to write in, episodes) unless it holds just these.

    What an earlier call wrote is replaced. ConfigError where there is no episode, or a data set from elsewhere in the way.
    """
    paths = sorted(Path(episodes).absolute().glob("*.npz"))
    if not paths:
        raise ConfigError(f"{episodes} holds no finished episode (*.npz): collect at least one first")
    note = json.dumps(listing(paths) if fps is None else [fps, listing(paths)])
    with _alone_in(target.parent):
        if target.exists() and not (target / STAGED_NOTE).is_file():
            raise ConfigError(f"{target} is a data set from elsewhere and is kept: give another output or name")
        if not target.exists() or (target / STAGED_NOTE).read_text() != note:
            with whole_folder(target) as folder:
                fill(folder, paths)
                (folder / STAGED_NOTE).write_text(note)
    return target


@contextlib.contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """Keep others that make something in this folder waiting. Where the file system has no locks nobody waits."""
    with writing_to(parent):
        parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that writes to {parent}", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
