"""Turns latents of a pixel-space model into pixels, and pixels into a PNG grid."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.arrays import is_finite
from ilf_trt.errors import InvalidRequest, NonFinite, one_line
from ilf_trt.files import write_whole

TILE = 64
GAP = 4
BACKGROUND = 32


def pixels_from_latents(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
    """latents (B, C, H, W) in [-1, 1], C 1 or 3 -> pixels (B, H, W, C).

    Raises InvalidRequest for another C, and NonFinite for NaN and infinity.
    """
    channels = latents.shape[1]
    if channels not in (1, 3):
        raise InvalidRequest(
            f"latents of {channels} channels are not pixels; "
            "write them with --latents-out and decode them with the model's VAE"
        )
    if not is_finite(latents):
        raise NonFinite("latents hold NaN or infinity, which is no picture; make them again in a higher --precision")
    shades = np.clip(latents, -1, 1) * 127.5 + 127.5
    return np.round(shades).astype(np.uint8).transpose(0, 2, 3, 1)


def grid(pixels: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """pixels (B, H, W, C) -> one picture (H', W', C) of all; each is enlarged to 64 rows or more, without smoothing."""
    if columns < 1:
        raise InvalidRequest(f"columns is {columns}, it must be at least 1")
    zoom = max(1, -(-TILE // pixels.shape[1]))
    tiles = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    count, height, width, channels = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), BACKGROUND, np.uint8)
    for index, tile in enumerate(tiles):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def image_of(pixels: NDArray[np.uint8]) -> Any:
    """pixels (H, W, C) -> a Pillow image."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def save_png(path: Path, sheet: NDArray[np.uint8]) -> None:
    """Write a picture (H, W, C) as PNG, whole or not at all; raises InvalidRequest if the file cannot be written."""
    content = BytesIO()
    image_of(sheet).save(content, format="PNG")
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {one_line(error)}; choose another --output") from error
