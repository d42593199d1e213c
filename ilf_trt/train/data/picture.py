"""A picture file as pixels: upright, cropped to its centre square, resized, in [-1, 1]."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ilf_trt.errors import BrokenSample, one_line
from ilf_trt.files import open_regular

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
MODES = {1: "L", 3: "RGB"}
UNREADABLE = (
    OSError,
    SyntaxError,  # Pillow's word for a damaged PNG
    ValueError,
    EOFError,
    MemoryError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def pixels_of(key: str, data: bytes | Path, *, size: int, channels: int) -> Tensor:
    """An encoded picture -> (channels, size, size) in float32; raises BrokenSample.

    Transparent pixels become white. A picture of `size` x `size` keeps its pixels.
    """
    try:
        with (
            BytesIO(data) if isinstance(data, bytes) else open_regular(data) as file,
            Image.open(file) as image,
        ):
            picture = _opaque(ImageOps.exif_transpose(image)).convert(MODES[channels])
    except UNREADABLE as error:
        raise BrokenSample(key, _reason(error)) from error
    if picture.size != (size, size):
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        centre = picture.crop((left, top, left + side, top + side))  # resize(box=…) reads beyond the box
        picture = centre.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture, np.float32).reshape(size, size, channels) / 127.5 - 1
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _opaque(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {picture.mode} are not 8 bits; save it with 8 bits a channel")
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow knows"
    return one_line(error)
