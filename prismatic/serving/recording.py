"""What a server was asked and answered, as a folder that can be looked at: requests.jsonl, a line a request, and its frames as JPEG.

A line: time, dialect, stream, instruction, frame and wrist (file names), state, actions (K, D) in the data set's units. Written by one thread,
behind the answers; when the disk is slower than the clients, or full, requests are left out and counted, never waited for.
"""

import contextlib
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.atomic import lock
from prismatic.errors import ConfigError
from prismatic.image import encode_jpeg
from prismatic.observation import Observation

REQUESTS, FRAMES = "requests.jsonl", "frames"
MOST_WAITING = 64  # requests that are not written yet, which lie in memory
LOG = logging.getLogger("serve")


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Recorder:
    """Appends to a folder; ConfigError when it can't be written from the start."""

    def __init__(self, folder: Path) -> None:
        try:
            (folder / FRAMES).mkdir(parents=True, exist_ok=True)
            self._lines = (folder / REQUESTS).open("a")
            lock(self._lines, f"another server writes to --record {folder}: give this one another folder")
        except OSError as error:
            raise ConfigError(f"--record {folder} can't be written ({error.strerror}): give another folder") from None
        self._folder = folder
        numbers = (int(path.stem) for path in (folder / FRAMES).glob("*.jpg") if path.stem.isdigit())
        self._number = 1 + max(numbers, default=-1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recorder")
        self._room = threading.Semaphore(MOST_WAITING)
        self._left_out = 0

    def add(self, observation: Observation, chunk: np.ndarray, dialect: str) -> None:
        """Return at once."""
        if not self._room.acquire(blocking=False):
            self._left_out += 1
            return
        row = {"time": utc_now(), "dialect": dialect, "stream": str(observation.stream)}
        with contextlib.suppress(RuntimeError):  # closed: this answer came later than the server waits for as it stops
            self._thread.submit(self._write, row, observation, chunk)

    def close(self) -> None:
        """Write what waits."""
        self._thread.shutdown()
        self._lines.close()
        if self._left_out:
            LOG.warning("%d requests were not recorded: the disk was too slow", self._left_out)

    def _write(self, row: dict[str, Any], observation: Observation, chunk: np.ndarray) -> None:
        try:
            row |= {"instruction": observation.instruction, "frame": self._image(observation.frame)}
            row["wrist"] = None if observation.wrist is None else self._image(observation.wrist)
            row["state"] = None if observation.state is None else observation.state.tolist()
            self._lines.write(json.dumps(row | {"actions": chunk.tolist()}) + "\n")
            self._lines.flush()
        except (OSError, ValueError) as error:
            LOG.warning("a request was not recorded: %s", error)
        finally:
            self._room.release()

    def _image(self, frame: np.ndarray) -> str:
        """The name of its file, within the folder."""
        name = f"{FRAMES}/{self._number:08d}.jpg"
        self._number += 1
        (self._folder / name).write_bytes(encode_jpeg(frame))
        return name
