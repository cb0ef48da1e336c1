"""OpenVLA's random changes of an image when learning, equal to what TensorFlow did in the original: crop, brightness, contrast, saturation, hue.

In: (S, S, 3) uint8. Out: the same shape. finetune.py hands `drawing(…)` to the examples; the centre crop when acting stands in image.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from prismatic.image import AUGMENTATIONS, CROP_AREA, crop_and_resize, to_uint8, to_unit

# Ranges of what is added (brightness: of the full range, hue: of the colour circle) or multiplied with.
BRIGHTNESS, CONTRAST, SATURATION, HUE = (-0.2, 0.2), (0.8, 1.2), (0.8, 1.2), (-0.05, 0.05)


def _rgb_to_hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(…, 3) in [0, 1] → hue, saturation, value, each in [0, 1]."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    value = rgb.max(axis=-1)
    chroma = value - rgb.min(axis=-1)
    safe = np.where(chroma > 0, chroma, np.float32(1))
    hue = np.where(value == blue, 4 + (red - green) / safe, np.float32(0))
    hue = np.where(value == green, 2 + (blue - red) / safe, hue)
    hue = np.where(value == red, (green - blue) / safe, hue) / np.float32(6)
    hue = np.where(chroma > 0, np.where(hue < 0, hue + 1, hue), np.float32(0))
    return hue, chroma / np.where(value > 0, value, np.float32(1)), value


def _hsv_to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    six = hue * np.float32(6)
    ramp = np.stack([np.abs(six - 3) - 1, 2 - np.abs(six - 2), 2 - np.abs(six - 4)], axis=-1)
    return ((1 - saturation)[..., None] + saturation[..., None] * np.clip(ramp, 0, 1)) * value[..., None]


@dataclass(frozen=True)
class Augmentation:
    """One draw of the training augmentations; applied in the order of the fields. None leaves an operation out."""

    crop_box: tuple[float, float, float, float] | None = None  # y1, x1, y2, x2 in [0, 1]
    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None

    @classmethod
    def draw(cls, rng: np.random.Generator, operations: Sequence[str] = AUGMENTATIONS) -> "Augmentation":
        """Random parameters for the named operations. All are drawn always, so that a seed means the same crop whatever is switched on."""
        side = float(np.sqrt(np.float32(CROP_AREA)))
        # independent of each other: the original's two offsets share a seed and are always equal
        y, x = rng.uniform(0.0, 1.0 - side, size=2)
        drawn = {
            "random_resized_crop": (float(y), float(x), float(y) + side, float(x) + side),
            "random_brightness": float(rng.uniform(*BRIGHTNESS)),
            "random_contrast": float(rng.uniform(*CONTRAST)),
            "random_saturation": float(rng.uniform(*SATURATION)),
            "random_hue": float(rng.uniform(*HUE)),
        }
        return cls(*(drawn[name] if name in operations else None for name in AUGMENTATIONS))

    def stages(self, image: np.ndarray) -> list[np.ndarray]:
        """(S, S, 3) uint8 → the float32 image in [0, 1] after each operation that is on, in order."""
        current, done = to_unit(image), []
        if self.crop_box is not None:
            done.append(current := np.clip(crop_and_resize(current, self.crop_box), 0, 1))
        if self.brightness is not None:
            done.append(current := np.clip(current + np.float32(self.brightness), 0, 1))
        if self.contrast is not None:
            mean = current.mean(axis=(0, 1), keepdims=True, dtype=np.float64).astype(np.float32)
            done.append(current := np.clip((current - mean) * np.float32(self.contrast) + mean, 0, 1))
        if self.saturation is not None:
            hue, saturation, value = _rgb_to_hsv(current)
            saturation = np.clip(saturation * np.float32(self.saturation), 0, 1)
            done.append(current := np.clip(_hsv_to_rgb(hue, saturation, value), 0, 1))
        if self.hue is not None:
            hue, saturation, value = _rgb_to_hsv(current)
            done.append(current := np.clip(_hsv_to_rgb((hue + np.float32(self.hue)) % 1, saturation, value), 0, 1))
        return done

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(S, S, 3) uint8 → augmented (S, S, 3) uint8."""
        stages = self.stages(image)
        return to_uint8(stages[-1]) if stages else image


def drawing(operations: Sequence[str]) -> Callable[[np.random.Generator], Augmentation] | None:
    """What draws augmentations of these operations; None where there are none."""
    return partial(Augmentation.draw, operations=tuple(operations)) if operations else None
