"""An image as a data set holds it (JPEG, another file format, pixels) → the JPEG bytes that a frame cache keeps, of the recorded size."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from prismatic.errors import ConfigError
from prismatic.image import decode_jpeg, encode_jpeg

JPEG_START = b"\xff\xd8"


def to_jpeg(image: bytes | np.ndarray, *, rotate: bool, where: str) -> bytes:
    """A file's bytes or (H, W, 3) uint8 pixels → JPEG of quality 95; a JPEG stays as it is, unless it has to be turned by 180°.

    where: for the ConfigError of an image that can't be read, such as "observation/image of episode 3".
    """
    if isinstance(image, bytes) and image.startswith(JPEG_START) and not rotate:
        return image
    pixels = _pixels(image, where)
    return encode_jpeg(np.ascontiguousarray(pixels[::-1, ::-1]) if rotate else pixels)


def _pixels(image: bytes | np.ndarray, where: str) -> np.ndarray:
    """(H, W, 3) uint8."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ConfigError(
                f"{where} is {image.dtype} of shape {image.shape}: give uint8 of shape (height, width, 3)"
            )
        return image
    try:
        if image.startswith(JPEG_START):
            return decode_jpeg(image)
        return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
    except (UnidentifiedImageError, ValueError, OSError, SyntaxError):
        raise ConfigError(f"{where} is no image that can be read (JPEG, PNG): repair or drop that episode") from None
