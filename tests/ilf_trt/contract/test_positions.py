"""Positions of patches are those of diffusers' PatchEmbed, in square grids and others."""

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed

from ilf_trt.contract.positions import positions_of
from ilf_trt.errors import InvalidRequest

TOLERANCE = 1e-7  # below one ulp of float32 at 1: sin and cos of numpy and of torch may round apart

GRIDS = ((1, 1), (8, 8), (64, 64), (128, 128), (32, 128), (128, 32), (7, 13), (1, 9), (33, 1), (88, 46))
MODELS = ((1152, 64, 2.0), (1152, 32, 1.0), (72, 8, 0.25), (4, 16, 1.0), (384, 7, 1.7))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_positions_are_those_of_diffusers(grid: tuple[int, int], model: tuple[int, int, float]) -> None:
    dim, base, scale = model
    wanted = get_2d_sincos_pos_embed(dim, grid, base_size=base, interpolation_scale=scale, output_type="pt")
    positions = positions_of(*grid, dim, base=base, scale=scale)
    assert (positions.dtype, positions.shape) == (np.float32, (*grid, dim))
    np.testing.assert_allclose(positions.reshape(-1, dim), wanted.float().numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 40)])
def test_a_patch_embedding_adds_them(height: int, width: int) -> None:
    """Of 16 x 16 patches it has them, of other grids it makes them."""
    patches = PatchEmbed(height=32, width=32, patch_size=2, in_channels=1, embed_dim=24, interpolation_scale=2)
    torch.nn.init.zeros_(patches.proj.weight)
    torch.nn.init.zeros_(patches.proj.bias)
    with torch.no_grad():
        added = patches(torch.ones(1, 1, 2 * height, 2 * width))
    positions = positions_of(height, width, 24, base=16, scale=2)
    np.testing.assert_allclose(positions.reshape(1, -1, 24), added.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("grid", [(0, 4), (4, 0), (-1, 4)])
def test_a_grid_without_patches_is_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequest, match=f"a grid of {grid[0]} x {grid[1]} patches"):
        positions_of(*grid, 8, base=16, scale=1)


@pytest.mark.parametrize("dim", [0, 2, 6, -4])
def test_a_width_that_four_does_not_divide_is_refused(dim: int) -> None:
    with pytest.raises(InvalidRequest, match=f"positions of {dim} values"):
        positions_of(4, 4, dim, base=16, scale=1)


@pytest.mark.parametrize(("base", "scale"), [(0, 1.0), (16, 0.0), (16, -1.0), (16, float("nan"))])
def test_a_base_or_scale_that_gives_no_positions_is_refused(base: int, scale: float) -> None:
    with pytest.raises(InvalidRequest, match=f"base {base} and scale {scale}"):
        positions_of(4, 4, 8, base=base, scale=scale)
