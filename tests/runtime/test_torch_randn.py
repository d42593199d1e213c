"""Noise: equality with torch.randn, pinned values of the numpy source, one seed per picture, and refusals."""

import subprocess
import sys
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ilf_trt.errors import InvalidRequest
from ilf_trt.runtime.start_noise import NoiseSource, noise, noise_per_picture

SEEDS = (0, 7, 2**31, 2**32 + 5, 2**63 - 1, 2**64 - 1, -1, -7, -(2**63))
SCALAR_SHAPES = ((1,), (2,), (15,), (1, 3, 2, 2))
BLOCK_SHAPES = ((16,), (17,), (31,), (2, 1, 8, 8), (3, 4, 5, 7), (2, 4, 64, 64), (1, 4, 128, 128))

# Torch's kernel for CPUs without AVX2 takes log, sin and cos from libm; measured 2.5e-6 from the AVX2 one.
OTHER_KERNEL_ATOL = 4e-6
TORCH_HAS_AVX2_KERNEL = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def torch_randn(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


def assert_bits_equal(got: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert got.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SCALAR_SHAPES)
def test_torch_source_equals_randn_below_16_values(shape: tuple[int, ...], seed: int) -> None:
    assert_bits_equal(noise(shape, seed, NoiseSource.TORCH), torch_randn(shape, seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", BLOCK_SHAPES)
def test_torch_source_equals_randn_from_16_values_on(shape: tuple[int, ...], seed: int) -> None:
    got, expected = noise(shape, seed, NoiseSource.TORCH), torch_randn(shape, seed)
    if TORCH_HAS_AVX2_KERNEL:
        assert_bits_equal(got, expected)
    else:
        np.testing.assert_allclose(got, expected, rtol=0, atol=OTHER_KERNEL_ATOL)


def test_torch_source_is_pinned() -> None:
    expected = np.array([-0.8201345, 0.39563116, 0.8989085, -1.3884039], dtype=np.float32)
    assert_bits_equal(noise((16,), 7, NoiseSource.TORCH)[:4], expected)


def test_numpy_source_is_pinned() -> None:
    expected = np.array([-0.5023736, 0.50684536, 2.0193486, 0.85149574], dtype=np.float32)
    assert_bits_equal(noise((2, 1, 8, 8), 7, NoiseSource.NUMPY)[0, 0, 0, :4], expected)


@pytest.mark.parametrize("source", NoiseSource)
def test_noise_is_contiguous_float32_of_the_shape(source: NoiseSource) -> None:
    x = noise((2, 4, 8, 8), 0, source)
    assert (x.shape, x.dtype, x.flags.c_contiguous) == ((2, 4, 8, 8), np.float32, True)


@pytest.mark.parametrize("source", NoiseSource)
def test_picture_does_not_depend_on_its_batch(source: NoiseSource) -> None:
    batch = noise_per_picture((3, 4, 8, 8), [11, 5, 11], source)
    assert batch.shape == (3, 4, 8, 8)
    for picture, seed in zip(batch, [11, 5, 11], strict=True):
        assert_bits_equal(picture[None], noise((1, 4, 8, 8), seed, source))


@pytest.mark.parametrize("source", NoiseSource)
@pytest.mark.parametrize("shape", [(), (0, 4, 8, 8), (1, -4, 8, 8), (1, 4.0, 8, 8)])
def test_shape_without_values_is_refused(shape: tuple[int, ...], source: NoiseSource) -> None:
    with pytest.raises(InvalidRequest, match="noise shape"):
        noise(shape, 0, source)


@pytest.mark.parametrize("source", NoiseSource)
@pytest.mark.parametrize("seed", [1.5, "3", None, True])
def test_seed_that_is_no_int_is_refused(seed: int, source: NoiseSource) -> None:
    with pytest.raises(InvalidRequest, match="must be an int"):
        noise((1,), seed, source)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seed_out_of_range_is_refused_as_in_torch(seed: int) -> None:
    with pytest.raises(InvalidRequest, match="torch noise seed"):
        noise((1,), seed, NoiseSource.TORCH)
    with pytest.raises((ValueError, RuntimeError), match="Overflow"):
        torch.Generator("cpu").manual_seed(seed)


def test_negative_seed_is_refused_by_the_numpy_source() -> None:
    with pytest.raises(InvalidRequest, match="numpy noise seed"):
        noise((1,), -1, NoiseSource.NUMPY)


def test_source_of_unknown_name_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="numpy, torch"):
        noise((1,), 0, cast(NoiseSource, "cuda"))


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3]])
def test_number_of_seeds_must_be_the_batch(seeds: list[int]) -> None:
    with pytest.raises(InvalidRequest, match="takes 2 seeds"):
        noise_per_picture((2, 4, 8, 8), seeds, NoiseSource.TORCH)


def test_noise_does_not_import_torch() -> None:
    code = "import sys, ilf_trt.runtime.torch_randn; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
