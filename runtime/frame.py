"""The frame of a picture: the size that is asked for, and the size that is made."""

from collections.abc import Sequence
from dataclasses import dataclass

from ilf_trt.errors import InvalidRequest
from ilf_trt.manifest import Manifest

from .sizes import bin_of, nearest


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
