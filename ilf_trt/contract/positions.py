"""The sinusoidal positions of patches in a grid, for sizes that a model was not exported with."""

import numpy as np
from numpy.typing import NDArray

from ilf_trt.errors import InvalidRequest

LONGEST_WAVE = 10000.0  # as in "Attention Is All You Need", section 3.5


def positions_of(height: int, width: int, dim: int, *, base: int, scale: float) -> NDArray[np.float32]:
    """-> (height, width, dim): a quarter each of sin and cos of the column, then of sin and cos of the row.

    Equal to diffusers' `get_2d_sincos_pos_embed(dim, (height, width), base_size=base, interpolation_scale=scale)`,
    which its PatchEmbed adds to patches: a grid of any size spans `base / scale` positions a side.
    Raises InvalidRequest for a side below 1, a dim that 4 does not divide, a base below 1 and a scale not above 0.
    """
    if height < 1 or width < 1:
        raise InvalidRequest(f"a grid of {height} x {width} patches has no patches; ask for sides of at least 1")
    if dim < 4 or dim % 4:
        raise InvalidRequest(f"positions of {dim} values do not split into four quarters; give a multiple of 4")
    if base < 1 or not scale > 0:
        raise InvalidRequest(
            f"base {base} and scale {scale} give no positions; give a base of 1 or more, a scale above 0"
        )
    half = (height, width, dim // 2)
    columns = np.broadcast_to(_waves(width, dim // 2, base, scale)[None, :], half)
    rows = np.broadcast_to(_waves(height, dim // 2, base, scale)[:, None], half)
    return np.concatenate([columns, rows], axis=2)


def _waves(count: int, dim: int, base: int, scale: float) -> NDArray[np.float32]:
    """-> (count, dim): sin, then cos, of each position at each of dim / 2 frequencies."""
    # Diffusers rounds positions to float32 here, and a position of 100 by 4e-6: without that, waves differ by as much.
    places = np.arange(count, dtype=np.float32) / np.float32(count / base) / np.float32(scale)
    omega = LONGEST_WAVE ** -(np.arange(dim // 2) / (dim / 2))
    angles = np.outer(places.astype(np.float64), omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
