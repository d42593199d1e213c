"""Turns latents of a pixel-space model into pixels, and pixels into a PNG grid."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.arrays import is_finite
from ilf_trt.errors import InvalidRequest, NonFinite, one_line
from ilf_trt.files import write_whole

from .png_file import KEYWORD

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
    count, *sides, channels = pixels.shape
    shape = grid_shape(count, (sides[0], sides[1]), columns)
    zoom = _zoom(sides[0])
    tiles = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    _, height, width, _ = tiles.shape
    columns = min(columns, count)
    sheet = np.full((*shape, channels), BACKGROUND, np.uint8)
    for index, tile in enumerate(tiles):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def grid_shape(count: int, size: tuple[int, int], columns: int) -> tuple[int, int]:
    """Height and width of the grid of `count` pictures, each of `size` (height, width); raises InvalidRequest."""
    if columns < 1:
        raise InvalidRequest(f"columns is {columns}, it must be at least 1")
    height, width = (side * _zoom(size[0]) + GAP for side in size)
    columns = min(columns, count)
    return -(-count // columns) * height + GAP, columns * width + GAP


def _zoom(height: int) -> int:
    return max(1, -(-TILE // height))


def image_of(pixels: NDArray[np.uint8]) -> Any:
    """pixels (H, W, C) -> a Pillow image."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def encoded_png(sheet: NDArray[np.uint8], record: bytes | None = None) -> bytes:
    """A picture (H, W, C) as PNG; `record` is the ASCII text of what made it, in a chunk `tEXt` before the pixels."""
    from PIL.PngImagePlugin import PngInfo

    texts, content = PngInfo(), BytesIO()
    if record is not None:
        texts.add_text(KEYWORD, record.decode("ascii"))
    image_of(sheet).save(content, format="PNG", pnginfo=texts)
    return content.getvalue()


def save_png(path: Path, sheet: NDArray[np.uint8], record: bytes | None = None) -> None:
    """Write a picture (H, W, C) as PNG, whole or not at all; raises InvalidRequest if the file cannot be written."""
    try:
        write_whole(path, encoded_png(sheet, record))
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {one_line(error)}; choose another --output") from error
