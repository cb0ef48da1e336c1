"""Pixels against TensorFlow's and PIL's own: JPEG, Lanczos, crop, normalisation, augmentation."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prismatic import image
from prismatic.augmentation import Augmentation
from tests.original import MEANS, STDS


def frames_of(folder: Path) -> dict[str, np.ndarray]:
    names = np.load(folder / "image_path.npz")["names"]
    return {str(name): np.asarray(Image.open(folder / "images" / f"{name}.png").convert("RGB")) for name in names}


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def arrays(numbers: Path) -> dict[str, np.ndarray]:
    return dict(np.load(numbers / "image_path.npz"))


def test_jpeg_round_trip_is_bit_equal_to_tensorflows(numbers: Path, arrays: dict[str, np.ndarray]) -> None:
    for name, frame in frames_of(numbers).items():
        expected = str(arrays[f"{name}__jpeg_decoded_sha256"])
        assert digest(image.jpeg_round_trip(frame)) == expected
        assert digest(image.decode_jpeg(arrays[f"{name}__jpeg_bytes"].tobytes())) == expected


def test_resize_differs_in_at_most_two_values_by_one(numbers: Path, arrays: dict[str, np.ndarray]) -> None:
    frames, equal = frames_of(numbers), 0
    for name, frame in frames.items():
        mine = image.resize_lanczos3(image.jpeg_round_trip(frame), 224)
        difference = np.abs(mine.astype(int) - arrays[f"{name}__resize_224"])
        assert difference.max() <= 1 and np.count_nonzero(difference) <= 2, name
        # turned, as get_libero_image does it
        turned = image.resize_lanczos3(image.jpeg_round_trip(np.ascontiguousarray(frame[::-1, ::-1])), 224)
        equal += digest(turned) == str(arrays[f"{name}__rotated_resize_sha256"])
    assert 3 * equal >= 2 * len(frames)  # the others differ in one or two values by one


def test_center_crop_and_pixel_values_are_equal(numbers: Path, arrays: dict[str, np.ndarray]) -> None:
    table = arrays["pixel_value_lut"]  # (6, 256): value of each channel and level
    for name in frames_of(numbers):
        cropped = image.center_crop(arrays[f"{name}__resize_224"])
        np.testing.assert_array_equal(cropped, arrays[f"{name}__center_crop_224"])
        values = image.normalize_pixels(cropped, MEANS, STDS)
        assert digest(values) == str(arrays[f"{name}__pixel_values_sha256"])
        np.testing.assert_allclose(values, [table[c][cropped[..., c % 3]] for c in range(6)], atol=1e-6)


def test_bicubic_squash_is_pils(numbers: Path, arrays: dict[str, np.ndarray]) -> None:
    compared = 0
    for name, frame in frames_of(numbers).items():
        if f"{name}__processor_bicubic_224" in arrays:
            np.testing.assert_array_equal(image.resize_bicubic(frame, 224), arrays[f"{name}__processor_bicubic_224"])
            compared += 1
    assert compared


def test_augmentation_with_the_originals_parameters(numbers: Path, arrays: dict[str, np.ndarray]) -> None:
    given = np.load(numbers / "augment.npz")
    keys = ("brightness_delta", "contrast_factor", "saturation_factor", "hue_delta")
    for i, name in enumerate(given["names"]):
        augmentation = Augmentation(tuple(given[f"{name}__crop_box"].tolist()), *(float(given[key][i]) for key in keys))
        frame = arrays[f"{name}__resize_224"]
        stages = np.stack([stage[::8, ::8] for stage in augmentation.stages(frame)])
        np.testing.assert_allclose(stages, given[f"{name}__stages_every8"], atol=1e-5)
        difference = np.abs(augmentation(frame).astype(int) - given[f"{name}__out"])
        assert difference.max() <= 1 and np.mean(difference > 0) < 1e-3


def test_random_parameters_keep_their_ranges_and_their_seed() -> None:
    drawn = [Augmentation.draw(np.random.default_rng(seed)) for seed in range(400)]
    boxes = np.array([a.crop_box for a in drawn])
    np.testing.assert_allclose((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), image.CROP_AREA, rtol=1e-6)
    assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-7
    assert abs(np.corrcoef(boxes[:, 0], boxes[:, 1])[0, 1]) < 0.2, "the two offsets must be independent"
    ranges = {"brightness": (-0.2, 0.2), "contrast": (0.8, 1.2), "saturation": (0.8, 1.2), "hue": (-0.05, 0.05)}
    for name, (low, high) in ranges.items():
        values = np.array([getattr(a, name) for a in drawn])
        assert low <= values.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < values.max() <= high
    assert Augmentation.draw(np.random.default_rng(3)) == drawn[3]


def test_an_operation_left_out_does_not_move_the_others() -> None:
    every = Augmentation.draw(np.random.default_rng(1))
    crop = Augmentation.draw(np.random.default_rng(1), ("random_resized_crop",))
    assert crop == Augmentation(crop_box=every.crop_box)


def test_damaged_jpeg_is_an_error() -> None:
    with pytest.raises(ValueError):
        image.decode_jpeg(b"no image")
