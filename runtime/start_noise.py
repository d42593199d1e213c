"""The start noise of a generation: from seeds, or from the caller's latents."""

import math
from collections.abc import Sequence
from enum import StrEnum
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ilf_trt.errors import InvalidRequest, told

from .arguments import array_of, listed, text_of
from .torch_randn import Float32Array, torch_randn

DLPACK_CUDA = 2  # DLDeviceType kDLCUDA
SEEDS = "a whole number or a list of them"


class NoiseSource(StrEnum):
    """The generator that turns a seed into noise; each makes other pictures of the same seed."""

    NUMPY = "numpy"
    TORCH = "torch"


def noise_from_seed(
    shape: tuple[int, ...], seed: int | Sequence[int], source: NoiseSource | str
) -> NDArray[np.float32]:
    """Noise of `shape` (B, C, H, W). One seed is for the whole batch; a list has one seed for each picture.

    Raises InvalidRequest for a seed of another type or number, or an unknown source.
    """
    sources = " or ".join(NoiseSource)
    try:
        source = NoiseSource(text_of("noise", source, sources))
    except ValueError as error:
        raise InvalidRequest(f"noise {told(source)} is unknown; use {sources}") from error
    if isinstance(seed, Integral):
        return noise(shape, _seed(seed), source)
    seeds = [_seed(one) for one in listed("seed", seed, SEEDS)]
    if len(seeds) != shape[0]:
        raise InvalidRequest(f"{len(seeds)} seeds for {shape[0]} pictures; pass one seed, or one for each picture")
    return noise_per_picture(shape, seeds, source)


def checked_latents(latents: ArrayLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """The caller's latents as an array; raises InvalidRequest unless they are float32 of `shape` and finite."""
    array = array_of("latents", latents)
    if array.shape != shape or array.dtype != np.float32:
        raise InvalidRequest(f"latents are {array.dtype} {array.shape}, expected float32 {shape}")
    check_finite_start(array)
    return array


def check_finite_start(latents: NDArray[Any]) -> None:
    """Raise InvalidRequest if start latents hold NaN or infinity, as they are or after the scheduler scaled them."""
    if not np.isfinite(latents).all():
        raise InvalidRequest("latents hold NaN or infinity; pass noise of unit variance")


def is_on_gpu(array: object) -> bool:
    """Whether an object says by DLPack that it lies on a GPU."""
    try:
        device: Any = array.__dlpack_device__()  # type: ignore[attr-defined]
        return bool(int(device[0]) == DLPACK_CUDA)
    except Exception:  # no such method, or an object that imitates one
        return False


def noise(shape: tuple[int, ...], seed: int, source: NoiseSource) -> Float32Array:
    """Standard normal noise of `shape`, float32 and C-contiguous; the same arguments give the same values.

    NUMPY is `Generator(Philox(seed)).standard_normal`; seed >= 0.
    TORCH is `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`; -2**63 <= seed < 2**64. Torch
    uses only the low 32 bits of the seed, so 5 and 2**32 + 5 give the same noise.
    TORCH equals torch 2.13 to the bit on x86 with AVX2 or AVX512: 0 of 21 million values differ. Its log, sin and cos
    equal those of torch's compiled header for all 2**24 uniforms. Torch's kernel for other CPUs
    (ATEN_CPU_CAPABILITY=default) differs from torch's AVX2 kernel in 38 % of the values, by up to 2.5e-6; below 16
    values the two kernels are the same.
    Source: ATen/native/cpu/DistributionTemplates.h and ATen/core/DistributionsHelper.h.

    Raises InvalidRequest for a source that is no NoiseSource, a size below 1, and a seed outside of these bounds.
    """
    _check_source(source)
    _check_shape(shape)
    _check_seed(seed, source)
    if source is NoiseSource.TORCH:
        return torch_randn(math.prod(shape), seed).reshape(shape)
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32)


def noise_per_picture(shape: tuple[int, ...], seeds: Sequence[int], source: NoiseSource) -> Float32Array:
    """Noise of `shape` (B, C, H, W) with one seed per picture: picture b is `noise((1, C, H, W), seeds[b], source)`.

    So a picture does not depend on its batch. Diffusers does the same with a list of B generators (`randn_tensor` in
    diffusers/utils/torch_utils.py). In contrast, `noise` with a single seed makes the whole batch from one stream.

    Raises InvalidRequest as `noise` does, and if the number of seeds is not B.
    """
    _check_shape(shape)
    if len(seeds) != shape[0]:
        raise InvalidRequest(f"noise of shape {shape} takes {shape[0]} seeds, got {len(seeds)}; pass one per picture")
    return np.concatenate([noise((1, *shape[1:]), seed, source) for seed in seeds])


def _check_source(source: NoiseSource) -> None:
    # A plain string equals its member, but `is` tells them apart: it would pick the other generator in silence.
    if not isinstance(source, NoiseSource):
        raise InvalidRequest(f"noise source must be a NoiseSource ({', '.join(NoiseSource)}), got {told(source)}")


def _check_shape(shape: tuple[int, ...]) -> None:
    if not shape or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise InvalidRequest(f"noise shape must be one or more integers >= 1, got {shape!r}; pass (B, C, H, W)")


def _seed(seed: Any) -> int:
    """An int of any integer; a bool is an int in Python, and as a seed it is a mistake."""
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise InvalidRequest(f"seed is {told(seed)}, expected {SEEDS}")
    return int(seed)


def _check_seed(seed: int, source: NoiseSource) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InvalidRequest(f"noise seed must be an int, got {told(seed)}; pass int(seed)")
    if source is NoiseSource.TORCH and not -(2**63) <= seed < 2**64:
        raise InvalidRequest(f"a torch noise seed must be in -2**63 .. 2**64 - 1, got {told(seed)}; pass seed % 2**64")
    if source is NoiseSource.NUMPY and seed < 0:
        raise InvalidRequest(f"a numpy noise seed must be >= 0, got {told(seed)}; pass seed >= 0")
