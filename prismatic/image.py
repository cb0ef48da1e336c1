"""Pixels of a camera frame on their way to the model, equal to what TensorFlow and PIL did in the original.

In: (H, W, 3) uint8 frames, upright. Out: (S, S, 3) uint8, then `pixel_values` (6, S, S) float32. Surprising: the frame goes through JPEG also
when acting (the model learnt on JPEGs); the JPEG decoder must be libjpeg's fast integer DCT (Pillow's differs by up to 16 levels); float to
uint8 is trunc(x * 255.5), as tf.image.convert_image_dtype does.
"""

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

JPEG_QUALITY = 95  # of 100; chroma 4:2:0: the settings of tf.image.encode_jpeg
CROP_AREA = 0.9  # share of the image that a random crop (training) and the centre crop (acting) keep
# What augmentation.py may do to an image when learning, in its order.
Change = Literal["random_resized_crop", "random_brightness", "random_contrast", "random_saturation", "random_hue"]
AUGMENTATIONS: tuple[Change, ...] = get_args(Change)
_LANCZOS_RADIUS = 3.0
_TO_UNIT = np.float32(1.0 / 255.0)


def encode_jpeg(frame: np.ndarray) -> bytes:
    """(H, W, 3) uint8 → JPEG bytes, quality 95, chroma 4:2:0; the scan data equals tf.image.encode_jpeg's."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


def decode_jpeg(data: bytes) -> np.ndarray:
    """JPEG bytes → (H, W, 3) uint8, bit-equal to tf.io.decode_image. ValueError if the bytes are no JPEG."""
    import simplejpeg  # here: bench.py gpu runs where it is not installed

    return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=False)


def jpeg_round_trip(frame: np.ndarray) -> np.ndarray:
    """What recording and reading back does to a frame: the policy must see live frames the way it learnt them."""
    return decode_jpeg(encode_jpeg(frame))


@dataclass(frozen=True)
class PreparedImage:
    """A live frame that has gone through an ImagePath: pixels (S, S, 3) uint8."""

    pixels: np.ndarray


@dataclass(frozen=True)
class ImagePath:
    """What a live frame (H, W, 3) uint8 goes through before its pixels are normalised: about 5 ms, best spent beside the camera."""

    size: int
    center_crop: bool

    def __call__(self, frame: np.ndarray) -> PreparedImage:
        pixels = resize_lanczos3(jpeg_round_trip(frame), self.size)
        return PreparedImage(center_crop(pixels) if self.center_crop else pixels)


@functools.lru_cache(maxsize=32)
def _lanczos3_matrix(size_in: int, size_out: int) -> Any:
    """Sparse weights (size_out, size_in) float32 of an antialiased Lanczos of radius 3 along one axis; a row's sum to 1.

    As TensorFlow's ScaleAndTranslate computes it: every step in float32, weights normalised per pixel.
    """
    from scipy.sparse import csr_array  # here: bench.py gpu runs where it is not installed

    one, half, radius = np.float32(1), np.float32(0.5), np.float32(_LANCZOS_RADIUS)
    inverse_scale = one / (np.float32(size_out) / np.float32(size_in))
    stretch = max(inverse_scale, one)
    centre = (np.arange(size_out, dtype=np.float32) + half) * inverse_scale
    first = np.maximum(np.ceil(centre - radius * stretch - half), 0).astype(np.int64)
    last = np.minimum(np.floor(centre + radius * stretch - half), size_in - 1).astype(np.int64)
    tap = first[:, None] + np.arange((last - first).max() + 1)
    x = np.abs((tap.astype(np.float32) + half - centre[:, None]) * (one / stretch))
    pi, safe = np.float32(np.pi), np.maximum(x, np.float32(1e-3))
    kernel = radius * _sine(pi * safe) * _sine(pi * safe / radius) / (pi * pi * safe * safe)
    kernel = np.where(x <= np.float32(1e-3), one, kernel) * (x <= radius) * (tap <= last[:, None])
    total = np.cumsum(kernel, axis=1, dtype=np.float32)[:, -1:]
    columns, starts = np.minimum(tap, size_in - 1), np.arange(size_out + 1) * tap.shape[1]
    return csr_array(((kernel * (one / total)).ravel(), columns.ravel(), starts), shape=(size_out, size_in))


def _sine(x: np.ndarray) -> np.ndarray:
    """float32 sine, correctly rounded: numpy's own float32 sine is off by an ulp now and then, which is enough to move a pixel."""
    return np.sin(x.astype(np.float64)).astype(np.float32)


def _resample_rows(pixels: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) float32 → (size, W, 3) float32. A sparse product adds taps one after another: float32 sums depend on their order."""
    return (_lanczos3_matrix(len(pixels), size) @ pixels.reshape(len(pixels), -1)).reshape(size, *pixels.shape[1:])


def resize_lanczos3(frame: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 → (size, size, 3) uint8: antialiased Lanczos3 in float32, rows first, rounded half to even and clipped."""
    height, width, _ = frame.shape
    pixels = frame.astype(np.float32)
    if height != size:
        pixels = _resample_rows(pixels, size)
    if width != size:
        pixels = _resample_rows(np.ascontiguousarray(pixels.transpose(1, 0, 2)), size).transpose(1, 0, 2)
    return np.ascontiguousarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def resize_bicubic(frame: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 → (size, size, 3) uint8: PIL's antialiased bicubic, both sides squashed ("resize-naive"); same size is a no-op."""
    if frame.shape[:2] == (size, size):
        return frame
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC))


def to_unit(image: np.ndarray) -> np.ndarray:
    """uint8 → float32 in [0, 1]."""
    return image.astype(np.float32) * _TO_UNIT


def to_uint8(image: np.ndarray) -> np.ndarray:
    """float → uint8 by trunc(x * 255.5) after clipping to [0, 1]."""
    return (np.clip(image, 0.0, 1.0) * np.float32(255.5)).astype(np.uint8)


def crop_and_resize(image: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """(S, S, 3) float32 → the same size, showing only box = (y1, x1, y2, x2) in [0, 1]; corner-aligned bilinear (tf.image.crop_and_resize)."""
    size = image.shape[0]
    y1, x1, y2, x2 = (np.float32(value) for value in box)
    last = np.float32(size - 1)
    steps = np.arange(size, dtype=np.float32)
    y = y1 * last + steps * ((y2 - y1) * last / last)
    x = x1 * last + steps * ((x2 - x1) * last / last)
    top, left = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    bottom, right = np.ceil(y).astype(np.int64), np.ceil(x).astype(np.int64)
    x_share, y_share = (x - left).astype(np.float32)[None, :, None], (y - top).astype(np.float32)[:, None, None]
    lefts = image.take(left, axis=1)
    # every row once: most are the upper of one and the lower of another
    mixed = lefts + (image.take(right, axis=1) - lefts) * x_share
    upper = mixed.take(top, axis=0)
    return upper + (mixed.take(bottom, axis=0) - upper) * y_share


def center_crop(image: np.ndarray) -> np.ndarray:
    """(S, S, 3) uint8 → its central 90 % of the area, back at (S, S, 3) uint8: the mean of the random crops it learnt with."""
    side = np.sqrt(np.float32(CROP_AREA))
    offset = (np.float32(1.0) - side) / np.float32(2.0)
    box = (offset, offset, offset + side, offset + side)
    return to_uint8(crop_and_resize(to_unit(image), box))


def normalize_pixels(image: np.ndarray, means: np.ndarray, stds: np.ndarray) -> np.ndarray:
    """(S, S, 3) uint8 → (3·K, S, S) float32, one normalised copy of the image for each of the K towers; means, stds: (K, 3).

    Each channel's 256 levels are normalised once and looked up, equal to the bit: at 224 pixels 2.5 → 0.5 ms of a core.
    """
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    normalised = (levels - means.astype(np.float32)[..., None]) / stds.astype(np.float32)[..., None]  # (K, 3, 256)
    planes = image.transpose(2, 0, 1).reshape(3, -1).astype(np.intp)
    values = np.empty((*means.shape, planes.shape[1]), np.float32)
    for tower, channel in np.ndindex(means.shape):
        normalised[tower, channel].take(planes[channel], out=values[tower, channel], mode="clip")
    return values.reshape(-1, *image.shape[:2])
