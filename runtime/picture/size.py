"""Picture sizes: the requested size, and the nearest size that the model was trained on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ilf_trt.contract.manifest import Manifest
from ilf_trt.errors import InvalidRequest

Size = tuple[int, int]  # height, width


@dataclass(frozen=True, slots=True)
class PictureSize:
    """The requested and the native size in pixels, and the native size in latent cells; each (height, width).

    The model makes the native size. The runtime then scales and crops the picture to the requested size.
    """

    requested: Size
    native: Size
    cells: Size

    @classmethod
    def of(cls, manifest: Manifest, size: Sequence[int] | None, *, binning: bool) -> "PictureSize":
        """The sizes for a request; without `size`, the bundle's default. `binning` picks the nearest trained size.

        Raises InvalidRequest for a size that the bundle was not built for.
        """
        spec, facts = manifest.spec, manifest.picture
        sizes = [(height * facts.cell, width * facts.cell) for height, width in spec.sizes]
        if size is None:
            default = (spec.latent[1] * facts.cell, spec.latent[2] * facts.cell)
            return cls(default, default, spec.latent[1:])
        requested = _size_in_pixels(size)
        native = bin_of(*requested, facts.bins) if binning and facts.bins else requested
        if native not in sizes:
            through = f" (made as {_text(native)})" if native != requested else ""
            raise InvalidRequest(
                f"size {_text(requested)}{through} is not among the bundle's {', '.join(map(_text, sizes))}; the "
                f"nearest is {_text(nearest(*native, sizes))}, or build the bundle with --size"
            )
        return cls(requested, native, (native[0] // facts.cell, native[1] // facts.cell))


def bin_of(height: int, width: int, bins: Mapping[str, Size]) -> Size:
    """The size among `bins` whose key, height / width as text, is nearest to the requested ratio.

    If two keys are equally near, the first one wins, as in diffusers' `classify_height_width_bin`. Raises
    InvalidRequest for a side below 1, and without bins.
    """
    check_sides(height, width)
    if not bins:
        raise InvalidRequest("this model has no bins of aspect ratios; pass one of the bundle's sizes")
    ratio = height / width
    return bins[min(bins, key=lambda key: abs(float(key) - ratio))]


def nearest(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` nearest to the requested size: first by the logarithm of its aspect ratio, then by its area.

    Raises InvalidRequest for a side below 1, and without sizes.
    """
    check_sides(height, width)
    if not sizes:
        raise InvalidRequest("no sizes to choose from; give at least one")

    def distance(size: Size) -> tuple[float, int]:
        return abs(math.log(size[0] / size[1]) - math.log(height / width)), abs(size[0] * size[1] - height * width)

    return min(sizes, key=distance)


def check_sides(height: int, width: int) -> None:
    """Raise InvalidRequest for a side below 1."""
    if height < 1 or width < 1:
        raise InvalidRequest(f"a picture of {height} x {width} pixels has no pixels; pass sides of at least 1")


def _size_in_pixels(size: Sequence[int]) -> Size:
    try:
        height, width = size
        whole = int(height) == height and int(width) == width and height > 0 and width > 0
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise InvalidRequest(f"size is {size!r}, expected (height, width) in pixels, such as (512, 768)")
    return int(height), int(width)


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
