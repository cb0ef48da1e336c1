"""What a server was asked and answered, as a folder that can be looked at: requests.jsonl, a line a request, and its frames as JPEG.

A line: time, dialect, stream, instruction, frame and wrist (file names), state, actions (K, 7) in the data set's units. Written by one thread,
behind the answers; when the disk is slower than the clients, or full, requests are left out and counted, never waited for.
"""

import json
import logging
import threading
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.errors import ConfigError
from prismatic.image import encode_jpeg
from prismatic.serving.observation import Observation

REQUESTS, FRAMES = "requests.jsonl", "frames"
MOST_WAITING = 64  # requests that are not written yet, which lie in memory


class Recorder:
    """Appends to a folder; ConfigError when it can't be written from the start."""

    def __init__(self, folder: Path) -> None:
        try:
            (folder / FRAMES).mkdir(parents=True, exist_ok=True)
            self._lines = (folder / REQUESTS).open("a")
        except OSError as error:
            raise ConfigError(f"--record {folder} can't be written ({error.strerror}): give another folder") from None
        self.folder = folder
        self._number = sum(1 for _ in (folder / FRAMES).iterdir())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recorder")
        self._room = threading.Semaphore(MOST_WAITING)
        self.left_out = 0

    def add(self, observation: Observation, chunk: np.ndarray, *, dialect: str, stream: Hashable) -> None:
        """Returns at once."""
        if not self._room.acquire(blocking=False):
            self.left_out += 1
            return
        row = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "dialect": dialect, "stream": str(stream)}
        try:
            self._thread.submit(self._write, row, observation, chunk)
        except RuntimeError:  # closed: the server stops, and this answer came later than it waited for
            self.left_out += 1

    def close(self) -> None:
        """Write what waits."""
        self._thread.shutdown()
        self._lines.close()
        if self.left_out:
            logging.getLogger("serve").warning("%d requests were not recorded: the disk was too slow", self.left_out)

    def _write(self, row: dict[str, Any], observation: Observation, chunk: np.ndarray) -> None:
        try:
            row["instruction"] = observation.instruction
            for name, frame in (("frame", observation.frame), ("wrist", observation.wrist)):
                row[name] = None if frame is None else self._frame(frame)
            row["state"] = None if observation.state is None else observation.state.tolist()
            row["actions"] = chunk.tolist()
            self._lines.write(json.dumps(row) + "\n")
            self._lines.flush()
        except (OSError, ValueError) as error:
            self.left_out += 1
            logging.getLogger("serve").warning("a request was not recorded: %s", error)
        finally:
            self._room.release()

    def _frame(self, frame: np.ndarray) -> str:
        name = f"{FRAMES}/{self._number:08d}.jpg"
        self._number += 1
        (self.folder / name).write_bytes(encode_jpeg(frame))
        return name
