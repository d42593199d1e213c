"""Scales and crops pictures from the native size of the model to the requested size."""

import numpy as np
from numpy.typing import NDArray

from ilf_trt.errors import InvalidRequest

from .size import check_sides


def resize_and_crop(pixels: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """pixels (B, H, W, 3), float32 -> (B, height, width, 3): scaled to cover the requested size, then cropped.

    The crop is the centre. The scaling is bilinear between pixel centres, without smoothing, as in diffusers'
    `resize_and_crop_tensor`. If the pixels have the requested size, the same array returns, not a copy. Raises
    InvalidRequest for pixels of another shape or dtype, and for a side below 1.
    """
    check_sides(height, width)
    if pixels.dtype != np.float32 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape[1:3]:
        raise InvalidRequest(f"pixels are {pixels.dtype} of shape {pixels.shape}, expected float32 of (B, H, W, 3)")
    if pixels.shape[1:3] == (height, width):
        return pixels
    # Diffusers rounds the product down: 1472 * (1480 / 1472) makes 1479 columns, and its crop leaves 1 column of them.
    ratio = max(height / pixels.shape[1], width / pixels.shape[2])
    covering = [max(int(old * ratio), new) for old, new in zip(pixels.shape[1:3], (height, width), strict=True)]
    above, below, down = _neighbours(pixels.shape[1], covering[0], height)
    left, right, across = _neighbours(pixels.shape[2], covering[1], width)
    rows = _between(pixels[:, above], pixels[:, below], down[:, None, None])  # (B, height, W, 3)
    return _between(rows[:, :, left], rows[:, :, right], across[:, None])  # (B, height, width, 3)


def _neighbours(old: int, covering: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """The two old pixels around each new pixel, and its distance from the first, 0 to 1; each (new,).

    An axis of `old` pixels is scaled to `covering` pixels; the new ones are the middle `new` of those.
    """
    indices = np.arange(new) + (covering - new) // 2
    centres = np.clip((indices + 0.5) * (old / covering) - 0.5, 0, old - 1)
    first = centres.astype(np.intp)
    return first, np.minimum(first + 1, old - 1), (centres - first).astype(np.float32)


def _between(a: NDArray[np.float32], b: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """a (1 - weight) + b weight."""
    return a + (b - a) * weight
