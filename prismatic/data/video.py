"""Frames of an mp4 file by time: decoded once, and never the neighbour of the one that is meant."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError

from prismatic.data.dataset_folder import AGAIN
from prismatic.errors import ConfigError
from prismatic.records import regular_file

HALF_A_FRAME = 0.499  # how far, in frames, a frame's time may lie from the one that is asked for


def frames_at(path: Path, seconds: Sequence[float], fps: float) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8: for each of the times, which rise, the frame within half a frame of that time after the file's first frame.

    fps: of the rows; a file that has more is read by its own. Works with presentation times: a foreign file's first may not be 0, and decoding
    times may be negative. ConfigError where the file is missing or damaged, and where it has no frame at a time.
    """
    with regular_file(path, way_out=AGAIN):
        pass
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            reach = HALF_A_FRAME / max(fps, float(stream.average_rate or 0))
            decoded = container.decode(stream)
            held = next(decoded, None)
            first = _time(held) if held else 0.0
            if held and seconds[0] > reach:  # what comes before is of no use
                container.seek(int((seconds[0] - reach + first) / float(stream.time_base or 1)), stream=stream)
                decoded = container.decode(stream)
                held = next(decoded, None)
            for second in seconds:
                while held is not None and _time(held) - first < second - reach:
                    held = next(decoded, None)
                if held is None:
                    raise ConfigError(f"{path} ends before second {second:.3f}, where a frame should be: {AGAIN}")
                if not _time(held) - first <= second + reach:  # NaN, too
                    raise ConfigError(
                        f"{path} has no frame at second {second:.3f}, the next is at {_time(held) - first:.3f}: {AGAIN}"
                    )
                yield held.to_ndarray(format="rgb24")
    except (FFmpegError, IndexError, OverflowError, ValueError) as error:
        raise ConfigError(f"{path} can't be decoded ({error}): {AGAIN}") from None


def _time(frame: av.VideoFrame) -> float:
    if frame.time is None:
        raise ValueError("a frame has no time")
    return frame.time
