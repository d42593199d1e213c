"""Computes torch.randn of a CPU in numpy, equal to the bit."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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


def torch_randn(size: int, seed: int) -> Float32Array:
    """-> (size,), float32, as torch's CPU kernel `normal_kernel` fills a contiguous tensor."""
    # RandomState seeds mt19937 as torch does (init_genrand), and its stream is frozen (NEP 19).
    stream = np.random.RandomState(seed & 0xFFFFFFFF)
    if size < BLOCK:
        return _normals_in_double(size, stream)
    uniforms = _uniforms(size, stream)
    whole = size - size % BLOCK
    normals = np.concatenate([_box_muller(uniforms[:whole]), uniforms[whole:]])
    if whole != size:
        # Torch completes the last block with 16 new values, which replace 16 - size % 16 values of the block before.
        normals[-BLOCK:] = _box_muller(_uniforms(BLOCK, stream))
    return normals


def _normals_in_double(size: int, stream: np.random.RandomState) -> Float32Array:
    """-> (size,), float32, from 53-bit uniforms of two draws each; in this kernel the angle comes before the radius."""
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
    # Torch ends with `x * std + mean`, std 1 and mean 0. That changes one value: -0 becomes +0.
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
    """a b + c, rounded once, like the fused multiply-add into which torch's compiler turns products and sums."""
    # The product is exact in float64. The sum's second rounding changed no result on any of the 2**24 uniforms.
    product = np.multiply(a, b, dtype=np.float64)
    return (product + c).astype(np.float32)
