"""The start noise of a generation: drawn from seeds, or given."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ilf_trt.conditions import as_array
from ilf_trt.errors import InvalidRequest

from .noise import NoiseSource, noise, noise_per_picture


def drawn(shape: tuple[int, ...], seed: int | Sequence[int], source: NoiseSource | str) -> NDArray[np.float32]:
    """Noise of `shape` (B, C, H, W): one seed draws the whole batch, a list each picture alone.

    Raises InvalidRequest for a seed of another type or number, or an unknown source.
    """
    try:
        source = NoiseSource(source)
    except ValueError as error:
        raise InvalidRequest(f"noise {source!r} is unknown; use {' or '.join(NoiseSource)}") from error
    if isinstance(seed, Integral) and not isinstance(seed, bool):
        return noise(shape, int(seed), source)
    if not isinstance(seed, Sequence):
        raise InvalidRequest(f"seed is {seed!r}, expected a whole number or a list of them")
    if len(seed) != shape[0]:
        raise InvalidRequest(f"{len(seed)} seeds for {shape[0]} pictures; give one seed, or one for each picture")
    return noise_per_picture(shape, seed, source)


def given(latents: ArrayLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """Start noise of the caller's, checked; raises InvalidRequest."""
    array = as_array("latents", latents)
    if array.shape != shape or array.dtype != np.float32:
        raise InvalidRequest(f"latents are {array.dtype} {array.shape}, expected float32 {shape}")
    if not np.isfinite(array).all():
        raise InvalidRequest("latents hold NaN or infinity; pass noise of unit variance")
    return array
