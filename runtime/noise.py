"""Start noise of unit variance from a seed, drawn with numpy's own generator or as torch.randn draws it on a CPU."""

import math
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from ilf_trt.errors import InvalidRequest

# Coefficients, highest power first, and split constants of Cephes logf and sinf (S. Moshier). Torch's AVX2 kernel
# evaluates these (ATen/native/cpu/avx_mathfun.h); numpy's log, sin and cos miss 14 % of its values, by up to 4 ulp.
LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
SIN_COEFFICIENTS = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_COEFFICIENTS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
QUARTER_PI_PARTS = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)

BLOCK = 16  # torch transforms 16 uniforms at a time: 8 radii, then 8 angles

Float32Array = NDArray[np.float32]


class NoiseSource(StrEnum):
    """The generator that turns a seed into noise; the two give different pictures for one seed."""

    NUMPY = "numpy"
    TORCH = "torch"


def noise(shape: tuple[int, ...], seed: int, source: NoiseSource) -> Float32Array:
    """Standard normal noise of `shape`, float32 and C-contiguous; the same arguments give the same values.

    NUMPY is `Generator(Philox(seed)).standard_normal`; seed >= 0.
    TORCH is `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`; -2**63 <= seed < 2**64, of which
    torch uses the low 32 bits only, so 5 and 2**32 + 5 give one noise. Equal to torch 2.13 to the bit on x86 with AVX2
    or AVX512: 0 of 21 million values differ, and log, sin and cos agree with its header, compiled, for all 2**24
    uniforms. Torch's kernel for other CPUs (ATEN_CPU_CAPABILITY=default) differs from its own AVX2 kernel in 38 % of
    the values, by up to 2.5e-6; below 16 values the kernels are one.
    Source: ATen/native/cpu/DistributionTemplates.h and ATen/core/DistributionsHelper.h.

    Raises InvalidRequest for a source that is no NoiseSource, a size below 1, and a seed outside of these bounds.
    """
    _check_source(source)
    _check_shape(shape)
    _check_seed(seed, source)
    if source is NoiseSource.TORCH:
        return _torch_randn(math.prod(shape), seed).reshape(shape)
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32)


def noise_per_picture(shape: tuple[int, ...], seeds: Sequence[int], source: NoiseSource) -> Float32Array:
    """Noise of `shape` (B, C, H, W) with one seed per picture: picture b is `noise((1, C, H, W), seeds[b], source)`.

    A picture so does not depend on the batch it is made in; diffusers does the same with a list of B generators
    (`randn_tensor` in diffusers/utils/torch_utils.py). `noise` with a single seed draws the whole batch in one stream.

    Raises InvalidRequest as `noise` does, and when the number of seeds is not B.
    """
    _check_shape(shape)
    if len(seeds) != shape[0]:
        raise InvalidRequest(f"noise of shape {shape} takes {shape[0]} seeds, got {len(seeds)}; give one per picture")
    return np.concatenate([noise((1, *shape[1:]), seed, source) for seed in seeds])


def _check_source(source: NoiseSource) -> None:
    # A plain string equals its member but is not it; let through, it would pick the other generator in silence.
    if not isinstance(source, NoiseSource):
        raise InvalidRequest(f"noise source must be a NoiseSource ({', '.join(NoiseSource)}), got {source!r}")


def _check_shape(shape: tuple[int, ...]) -> None:
    if not shape or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise InvalidRequest(f"noise shape must be one or more integers >= 1, got {shape!r}; give it as (B, C, H, W)")


def _check_seed(seed: int, source: NoiseSource) -> None:
    # A bool is an int to Python; torch refuses it, and as a seed it is a mistake with either source.
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InvalidRequest(f"noise seed must be an int, got {seed!r} of type {type(seed).__name__}; use int(seed)")
    if source is NoiseSource.TORCH and not -(2**63) <= seed < 2**64:
        raise InvalidRequest(f"a torch noise seed must be in -2**63 .. 2**64 - 1, got {seed}; use seed % 2**64")
    if source is NoiseSource.NUMPY and seed < 0:
        raise InvalidRequest(f"a numpy noise seed must be >= 0, got {seed}; use a positive seed")


def _torch_randn(size: int, seed: int) -> Float32Array:
    """-> (size,), float32, as torch's CPU kernel `normal_kernel` fills a contiguous tensor."""
    # RandomState seeds mt19937 as torch does (init_genrand), and its stream is frozen (NEP 19).
    stream = np.random.RandomState(seed & 0xFFFFFFFF)
    if size < BLOCK:
        return _normals_in_double(size, stream)
    uniforms = _uniforms(size, stream)
    whole = size - size % BLOCK
    normals = np.concatenate([_box_muller(uniforms[:whole]), uniforms[whole:]])
    if whole != size:
        # Torch fills an incomplete last block by drawing the last 16 values anew, over 16 - size % 16 finished ones.
        normals[-BLOCK:] = _box_muller(_uniforms(BLOCK, stream))
    return normals


def _normals_in_double(size: int, stream: np.random.RandomState) -> Float32Array:
    """-> (size,), float32, from 53-bit uniforms of two draws each; here the angle is drawn before the radius."""
    pairs = (size + 1) // 2
    high, low = np.moveaxis(_draws((pairs, 2, 2), stream).astype(np.uint64), -1, 0)  # each (pairs, 2)
    u = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) * 2.0**-53
    theta, radius = 2 * np.pi * u[:, 0], np.sqrt(-2 * np.log1p(-u[:, 1]))  # each (pairs,)
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1).ravel()[:size].astype(np.float32)


def _uniforms(size: int, stream: np.random.RandomState) -> Float32Array:
    """-> (size,) in [0, 1), float32, from the low 24 bits of a draw each."""
    return (_draws((size,), stream) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2.0**-24)


def _draws(shape: tuple[int, ...], stream: np.random.RandomState) -> NDArray[np.uint32]:
    return stream.randint(0, 2**32, size=shape, dtype=np.uint32)


def _box_muller(uniforms: Float32Array) -> Float32Array:
    """uniforms (16 k,) -> normals (16 k,)."""
    u = uniforms.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - u[:, 0]))  # (k, 8)
    sin, cos = _sin_cos(np.float32(2 * np.pi) * u[:, 1])  # each (k, 8)
    normals = np.stack([radius * cos, radius * sin], axis=1)  # (k, 2, 8)
    # Torch's closing `x * std + mean` with std 1 and mean 0 changes one thing: it makes -0 a +0.
    return (normals + np.float32(0)).ravel()


def _log(u: Float32Array) -> Float32Array:
    """ln u for u in (0, 1], by Cephes: u = m 2**e with m in [sqrt(1/2), sqrt(2)), a polynomial in x = m - 1."""
    mantissa, exponent = np.frexp(u)
    low = mantissa < np.float32(math.sqrt(0.5))
    x = np.where(low, 2 * mantissa, mantissa) - np.float32(1)
    e = (exponent - low).astype(np.float32)
    z = x * x
    y = _multiply_add(_polynomial(x, LOG_COEFFICIENTS) * x, z, e * LN2_LOW)
    y = _multiply_add(z, np.float32(-0.5), y)
    return _multiply_add(e, LN2_HIGH, x + y)


def _sin_cos(theta: Float32Array) -> tuple[Float32Array, Float32Array]:
    """sin and cos of theta in [0, 2 pi), by Cephes: a polynomial each in x = theta - j pi / 4, where j is even."""
    j = ((theta * np.float32(4 / np.pi)).astype(np.int32) + 1) & ~1
    x = theta
    for part in QUARTER_PI_PARTS:
        x = _multiply_add(j.astype(np.float32), np.float32(-part), x)
    z = x * x
    sin = _multiply_add(_polynomial(z, SIN_COEFFICIENTS) * z, x, x)
    cos = _multiply_add(_polynomial(z, COS_COEFFICIENTS) * z, z, np.float32(-0.5) * z) + np.float32(1)
    swapped = (j & 2) != 0
    sin, cos = np.where(swapped, cos, sin), np.where(swapped, sin, cos)
    return np.where((j & 4) != 0, -sin, sin), np.where(((j + 2) & 4) != 0, -cos, cos)


def _polynomial(x: Float32Array, coefficients: Sequence[float]) -> Float32Array:
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _multiply_add(y, x, np.float32(coefficient))
    return y


def _multiply_add(a: Float32Array, b: Float32Array | np.float32, c: Float32Array | np.float32) -> Float32Array:
    """a b + c, rounded once as a fused multiply-add does: torch's compiler contracts the kernel's products and sums."""
    # The product is exact in float64. The sum's second rounding changed no result on any of the 2**24 uniforms.
    product = np.multiply(a, b, dtype=np.float64)
    return (product + c).astype(np.float32)
