"""What processes hand to one another in files: the same noise and conditions for both, and the latents of a row."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.arrays import write_npz

NOISE = "noise"

Arrays = dict[str, NDArray[Any]]


def write_inputs(path: Path, noise: NDArray[np.float32], conditions: Mapping[str, NDArray[Any]]) -> None:
    """Write noise (B, C, H, W) and the conditions by port name."""
    with path.open("wb") as file:
        write_npz(file, {NOISE: noise, **conditions})


def read_inputs(path: Path) -> tuple[NDArray[np.float32], Arrays]:
    """The noise, and the conditions by port name."""
    with np.load(path, allow_pickle=False) as arrays:
        values = {name: arrays[name] for name in arrays.files}
    return values.pop(NOISE), values


def write_latents(path: Path, latents: NDArray[Any]) -> None:
    """Write the latents of a row, or their pixels."""
    with path.open("wb") as file:
        np.save(file, latents, allow_pickle=False)


def read_latents(path: Path) -> NDArray[Any]:
    """What `write_latents` wrote."""
    array: NDArray[Any] = np.load(path, allow_pickle=False)
    return array


def png_of(pixels: NDArray[np.uint8]) -> bytes:
    """One picture (H, W, 3 or 1) as PNG."""
    from PIL import Image

    content = BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(content, "PNG")
    return content.getvalue()


def decibels(array: NDArray[Any], reference: NDArray[Any]) -> float | None:
    """Peak signal-to-noise ratio: the reference's range over the root mean square difference; None for equal arrays."""
    a, b = (np.asarray(each, np.float64) for each in (array, reference))
    error = float(np.sqrt(np.mean((a - b) ** 2)))
    extent = float(b.max() - b.min())
    return 20 * float(np.log10(extent / error)) if error and extent else None


def relative_difference(array: NDArray[Any], reference: NDArray[Any]) -> float | None:
    """The largest difference over the reference's largest magnitude; None for a reference of zeros."""
    a, b = (np.asarray(each, np.float64) for each in (array, reference))
    largest = float(np.abs(b).max())
    return float(np.abs(a - b).max()) / largest if largest else None
