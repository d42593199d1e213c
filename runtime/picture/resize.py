"""Sizes of pictures: the model's own that is nearest to the asked one, and pixels brought from the one to the other."""

import numpy as np
from numpy.typing import NDArray

from ilf_trt.errors import InvalidRequest
from ilf_trt.runtime.picture.size import check_sides


def resized_and_cropped(pixels: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """pixels (B, H, W, 3), float32 -> (B, height, width, 3): scaled to cover the asked size, then cut to its centre.

    Bilinear between the centres of pixels and without smoothing, as diffusers' `resize_and_crop_tensor`. Pixels that
    have the asked size are returned as they are, not copied. Raises InvalidRequest for other pixels and a side below 1.
    """
    check_sides(height, width)
    if pixels.dtype != np.float32 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape[1:3]:
        raise InvalidRequest(f"pixels are {pixels.dtype} of shape {pixels.shape}, expected float32 of (B, H, W, 3)")
    if pixels.shape[1:3] == (height, width):
        return pixels
    # Diffusers rounds the product down: 1472 * (1480 / 1472) makes 1479 columns, and its crop leaves 1 column of them.
    ratio = max(height / pixels.shape[1], width / pixels.shape[2])
    covering = [max(int(had * ratio), asked) for had, asked in zip(pixels.shape[1:3], (height, width), strict=True)]
    above, below, down = _neighbours(pixels.shape[1], covering[0], height)
    left, right, across = _neighbours(pixels.shape[2], covering[1], width)
    rows = _between(pixels[:, above], pixels[:, below], down[:, None, None])  # (B, height, W, 3)
    return _between(rows[:, :, left], rows[:, :, right], across[:, None])  # (B, height, width, 3)


def _neighbours(had: int, covering: int, asked: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """The two pixels of `had` between which each of the middle `asked` of `covering` lies, and its distance from the
    first, 0 to 1; each (asked,)."""
    places = np.arange(asked) + (covering - asked) // 2
    centres = np.clip((places + 0.5) * (had / covering) - 0.5, 0, had - 1)
    first = centres.astype(np.intp)
    return first, np.minimum(first + 1, had - 1), (centres - first).astype(np.float32)


def _between(a: NDArray[np.float32], b: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """a (1 - weight) + b weight."""
    return a + (b - a) * weight
