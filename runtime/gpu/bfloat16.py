"""bfloat16 as its 16 bits: numpy has no such dtype, so the host holds float32."""

import numpy as np
from numpy.typing import NDArray

BFLOAT16 = "bfloat16"


def bfloat16_from_float32(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of each value, rounded to nearest even as torch rounds; any shape."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def float32_from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The exact value of each number; any shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
