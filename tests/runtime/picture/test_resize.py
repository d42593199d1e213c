"""The nearest size, and pixels brought to it, as diffusers' PixArtImageProcessor has them."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor

from ilf_trt.errors import InvalidRequest
from ilf_trt.runtime.picture.resize import resize_and_crop
from ilf_trt.runtime.picture.size import Size, bin_of, nearest

HALF_A_LEVEL = 0.55  # of 255: only the result is rounded; torch has places in float32, 1e-4 off at 1500, of 255 levels
BINS = {
    "0.25": (512, 2048),
    "0.48": (704, 1472),
    "0.5": (704, 1408),
    "0.52": (704, 1344),
    "0.97": (1008, 1040),
    "1.0": (1024, 1024),
    "1.07": (1056, 992),
    "2.0": (1408, 704),
    "4.0": (2048, 512),
}

# old height, old width, new height, new width
CHANGES = (
    (64, 64, 32, 32),
    (32, 32, 64, 64),
    (64, 64, 63, 65),
    (33, 47, 71, 29),
    (47, 33, 29, 71),
    (96, 48, 48, 96),
    (48, 96, 96, 48),
    (128, 96, 17, 13),
    (13, 17, 96, 128),
    (64, 48, 64, 40),
    (64, 48, 60, 48),
    (1, 1, 8, 8),
    (8, 8, 1, 1),
    (1, 9, 9, 1),
    (100, 51, 50, 25),
)


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8).astype(np.float32)


def reference(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """-> (B, height, width, 3), float32."""
    samples = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    return PixArtImageProcessor.resize_and_crop_tensor(samples, width, height).permute(0, 2, 3, 1).numpy()


def test_the_bin_of_any_size_is_that_of_diffusers() -> None:
    for height in range(256, 2304, 64):
        for width in range(256, 2304, 64):
            wanted = PixArtImageProcessor.classify_height_width_bin(height, width, BINS)
            assert bin_of(height, width, BINS) == wanted


def test_of_two_bins_equally_near_the_first_counts() -> None:
    bins = {"1.5": (600, 400), "0.5": (400, 800)}
    assert bin_of(100, 100, bins) == PixArtImageProcessor.classify_height_width_bin(100, 100, bins) == (600, 400)


@pytest.mark.parametrize(
    ("requested", "wanted"),
    [
        ((1024, 1024), (1024, 1024)),
        ((600, 600), (512, 512)),
        ((900, 900), (1024, 1024)),
        ((512, 1100), (512, 1024)),
        ((1100, 512), (1024, 512)),
        ((1, 9000), (512, 1024)),
        ((700, 512), (512, 512)),
        ((750, 512), (1024, 512)),
    ],
)
def test_the_nearest_size_is_so_by_its_ratio_then_by_its_area(requested: Size, wanted: Size) -> None:
    sizes = [(512, 512), (1024, 1024), (512, 1024), (1024, 512)]
    assert nearest(*requested, sizes) == nearest(*requested, sizes[::-1]) == wanted


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_pixels_equal_those_of_diffusers(change: tuple[int, int, int, int]) -> None:
    old_height, old_width, height, width = change
    pixels = random_pixels(2, old_height, old_width, 3)
    resized = resize_and_crop(pixels, height, width)
    assert (resized.dtype, resized.shape) == (np.float32, (2, height, width, 3))
    assert np.abs(resized - reference(pixels, height, width)).max() < HALF_A_LEVEL


def test_any_pair_of_sizes_equals_that_of_diffusers() -> None:
    rng = np.random.default_rng(1)
    compared = 0
    for old_height, old_width, height, width in rng.integers(1, 80, (200, 4)):
        pixels = random_pixels(1, old_height, old_width, 3)
        wanted = reference(pixels, height, width)
        if wanted.shape[1:3] != (height, width):  # see the next test
            continue
        compared += 1
        assert np.abs(resize_and_crop(pixels, height, width) - wanted).max() < HALF_A_LEVEL
    assert compared > 150


def test_the_requested_size_comes_out_where_diffusers_loses_it() -> None:
    pixels = random_pixels(1, 704, 1472, 3)
    assert reference(pixels, 512, 1480).shape == (1, 512, 1, 3)
    resized = resize_and_crop(pixels, 512, 1480)
    samples = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    covering = torch.nn.functional.interpolate(samples, (707, 1480), mode="bilinear").permute(0, 2, 3, 1).numpy()
    assert np.abs(resized - covering[:, 97 : 97 + 512]).max() < HALF_A_LEVEL


def test_pixels_of_the_requested_size_are_not_copied() -> None:
    pixels = random_pixels(2, 24, 40, 3)
    assert resize_and_crop(pixels, 24, 40) is pixels


def test_one_colour_stays_that_colour() -> None:
    for level in (0, 1, 127, 254, 255):
        assert (resize_and_crop(np.full((1, 33, 47, 3), level, np.float32), 50, 21) == level).all()


@pytest.mark.parametrize(
    "pixels",
    [random_pixels(1, 8, 8, 1), random_pixels(8, 8, 3), random_pixels(1, 0, 8, 3), np.zeros((1, 8, 8, 3), np.uint8)],
    ids=["one channel", "no batch", "no rows", "uint8"],
)
def test_other_pixels_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(InvalidRequest, match=r"expected float32 of \(B, H, W, 3\)"):
        resize_and_crop(pixels, 4, 4)


@pytest.mark.parametrize(("height", "width"), [(0, 4), (4, 0), (-4, 4)])
def test_a_side_below_one_is_refused(height: int, width: int) -> None:
    for call in (
        lambda: bin_of(height, width, BINS),
        lambda: nearest(height, width, [(4, 4)]),
        lambda: resize_and_crop(random_pixels(1, 8, 8, 3), height, width),
    ):
        with pytest.raises(InvalidRequest, match=f"a picture of {height} x {width} pixels"):
            call()


def test_a_choice_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no bins of aspect ratios"):
        bin_of(4, 4, {})
    with pytest.raises(InvalidRequest, match="no sizes to choose from"):
        nearest(4, 4, [])
