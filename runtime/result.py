"""What a generation gives: pictures, latents, timings, the plan that was followed, and the record of all this."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.plan import StepPlan
from ilf_trt.errors import InvalidRequest

from .picture.png import image_of
from .provenance import Origin, Provenance
from .request import Request
from .timings import Timings

COLUMNS = 10


@dataclass(frozen=True, slots=True)
class Result:
    """`latents` float32 (B, C, H, W): a numpy array, or with `on_device` a `DeviceArray`.

    `pixels` uint8 (B, H, W, 3 or 1), None where nothing was decoded; `cut` is what was cut off of every prompt that is
    longer than the model's text, "" where nothing was, and empty without prompts. `request` is what was served, at
    `origin`.
    """

    latents: Any
    pixels: NDArray[np.uint8] | None
    timings: Timings
    request: Request
    origin: Origin
    cut: tuple[str, ...] = ()

    @property
    def plan(self) -> StepPlan:
        return self.request.plan

    @property
    def images(self) -> list[Any]:
        """The pictures as Pillow images; raises InvalidRequest where nothing was decoded."""
        if self.pixels is None:
            raise InvalidRequest(
                "these are latents without pictures; build the bundle with --pipeline and its decoder, or decode them "
                "with the model's own VAE"
            )
        return [image_of(pixels) for pixels in self.pixels]

    def provenance(self, columns: int = COLUMNS) -> Provenance:
        """What made the pictures, for a sheet with `columns` of them in a row; `ilf-trt replay` makes them again of it.

        Conditions and start noise are recorded as digests: ask before you change the arrays that you passed. Raises
        InvalidRequest for start noise that lies on a GPU.
        """
        return Provenance.of(self.request, self.origin, len(self.latents), columns)
