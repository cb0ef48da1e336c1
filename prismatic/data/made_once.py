"""Folders that are there whole or not at all, and made once: frame caches, and data sets of staged episodes.

What is half-written lies in a hidden folder beside it, locked by its writer, so that the next call can tell it from one whose writer was killed.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prismatic.data.cache_files import CACHE_FORMAT, OLD_FORMAT
from prismatic.data.dataset_folder import listing
from prismatic.data.staging import writing_to
from prismatic.errors import ConfigError
from prismatic.filenames import CACHE_META, STAGED_NOTE, UNFINISHED
from prismatic.records import read_object

LOCK, LOCKING = "writer.lock", ".locking-"


def cached(cache_dir: Path, name: str, identity: Any, fill: Callable[[Path], None]) -> Path:
    """The folder `cache_dir/name-<key of identity>`, filled by `fill` where it isn't there yet. identity: JSON-ready, what the content depends on."""
    cache_dir = Path(cache_dir).absolute()
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, identity]).encode()).hexdigest()
    cache = cache_dir / f"{name}-{key[:12]}"
    if (cache / CACHE_META).is_file():
        return cache
    with unfinished(cache_dir) as folder:
        fill(folder)
        with writing_to(cache_dir):
            try:
                folder.rename(cache)
            except OSError:
                if not (cache / CACHE_META).is_file():  # else another process was quicker: its is as good
                    raise
    _delete_older(cache, name)
    return cache


def _delete_older(cache: Path, name: str) -> None:
    """Delete what an earlier format made of the same source: nothing opens it any more."""
    source = read_object(cache / CACHE_META).get("source")
    for meta in cache.parent.glob(f"{glob.escape(name)}-*/{CACHE_META}"):
        with contextlib.suppress(ConfigError):
            found = read_object(meta)
            if source and found.get("source") == source and found.get("format") == OLD_FORMAT:
                shutil.rmtree(meta.parent, ignore_errors=True)


def made_of_staged(
    episodes: Path, target: Path, fill: Callable[[Path, Sequence[Path]], Path], *, fps: float | None = None
) -> Path:
    """The data set `target` of a folder's staged episodes, made by `fill` (folder to write in, episodes → what it made) unless it holds just these.

    What an earlier call wrote is replaced. ConfigError where there is no episode, or a data set from elsewhere in the way.
    """
    paths = sorted(Path(episodes).absolute().glob("*.npz"))
    if not paths:
        raise ConfigError(f"{episodes} holds no finished episode (*.npz): collect at least one first")
    note = json.dumps(listing(paths) if fps is None else [fps, listing(paths)])
    if target.exists():
        if not (target / STAGED_NOTE).is_file():
            raise ConfigError(f"{target} is a data set from elsewhere and is kept: give another output or name")
        if (target / STAGED_NOTE).read_text() == note:
            return target
    with unfinished(target.parent) as folder, writing_to(target.parent):
        made = fill(folder, paths)
        (made / STAGED_NOTE).write_text(note)
        if target.exists():
            target.rename(folder.parent / "replaced")
        made.rename(target)
    return target


@contextlib.contextmanager
def unfinished(parent: Path) -> Iterator[Path]:
    """A new folder inside a hidden one in `parent`, which goes away in the end, whatever happens; so do those of killed writers."""
    with writing_to(parent):
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        place = Path(tempfile.mkdtemp(prefix=LOCKING, dir=parent))
        (place / "new").mkdir()  # with the usual permissions, unlike the hidden one
        lock = (place / LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        hidden = place.rename(parent / place.name.replace(LOCKING, UNFINISHED))  # locked before any sweep sees it
        folder = hidden / "new"
    try:
        yield folder
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        lock.close()


def _sweep(parent: Path) -> None:
    """Delete what writers left behind that are no more: nobody holds its lock."""
    for path in parent.glob(f"{UNFINISHED}*/{LOCK}"):
        with contextlib.suppress(OSError), path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
