"""The frame of a picture: the size that is asked for, and the size that is made."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ilf_trt.contract.manifest import Manifest
from ilf_trt.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Frame:
    """Pixels (height, width) that are asked for and that are made, and the made one's latent (H, W) in cells."""

    asked: tuple[int, int]
    made: tuple[int, int]
    cells: tuple[int, int]

    @classmethod
    def of(cls, manifest: Manifest, size: Sequence[int] | None, *, binning: bool) -> "Frame":
        """The bundle's default without a size. `binning` brings a size to the nearest that the model was trained on.

        Raises InvalidRequest for a size that the bundle was not built for.
        """
        spec, facts = manifest.spec, manifest.picture
        sizes = [(height * facts.cell, width * facts.cell) for height, width in spec.sizes]
        if size is None:
            default = (spec.latent[1] * facts.cell, spec.latent[2] * facts.cell)
            return cls(default, default, spec.latent[1:])
        asked = _checked(size)
        made = bin_of(*asked, facts.bins) if binning and facts.bins else asked
        if made not in sizes:
            words = ", ".join(map(_words, sizes))
            through = f" (made as {_words(made)})" if made != asked else ""
            raise InvalidRequest(
                f"size {_words(asked)}{through} is not among the bundle's {words}; the nearest is "
                f"{_words(nearest(*made, sizes))}, or build it with --size"
            )
        return cls(asked, made, (made[0] // facts.cell, made[1] // facts.cell))


def _checked(size: Sequence[int]) -> tuple[int, int]:
    try:
        height, width = size
        whole = int(height) == height and int(width) == width and height > 0 and width > 0
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise InvalidRequest(f"size is {size!r}, expected (height, width) in pixels, such as (512, 768)")
    return int(height), int(width)


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


Size = tuple[int, int]  # height, width


def bin_of(height: int, width: int, bins: Mapping[str, Size]) -> Size:
    """The size among `bins`, keyed by height / width as text, whose key is nearest to the asked ratio.

    Of two keys equally near the first one counts, as in diffusers' `classify_height_width_bin`. Raises InvalidRequest
    for a side below 1, and without bins.
    """
    check_sides(height, width)
    if not bins:
        raise InvalidRequest("this model has no bins of aspect ratios; ask for one of its own sizes")
    ratio = height / width
    return bins[min(bins, key=lambda key: abs(float(key) - ratio))]


def nearest(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` nearest to the asked by the logarithm of its aspect ratio, among equals by its area.

    Raises InvalidRequest for a side below 1, and without sizes.
    """
    check_sides(height, width)
    if not sizes:
        raise InvalidRequest("no sizes to choose from; give at least one")

    def distance(size: Size) -> tuple[float, int]:
        return abs(math.log(size[0] / size[1]) - math.log(height / width)), abs(size[0] * size[1] - height * width)

    return min(sizes, key=distance)


def check_sides(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise InvalidRequest(f"a picture of {height} x {width} pixels has no pixels; ask for sides of at least 1")
