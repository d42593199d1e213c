"""What a caller asks for each picture: read from a file, checked against the model's condition ports, padded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.bundle import read_arrays
from ilf_trt.contract.ports import NEGATIVE, Port
from ilf_trt.contract.spec import ModelSpec
from ilf_trt.errors import BundleError, InvalidRequest


def numbers_of(text: str, what: str) -> list[int]:
    """`"3,8"` -> [3, 8]; `"0-9"` -> 0 to 9; raises InvalidRequest, which calls them `what`."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InvalidRequest(f"{what} {text!r} is not a list of numbers; give 3,8 or 0-9")
        span = range(int(first), int(last if dash else first) + 1)
        if not span:
            raise InvalidRequest(f"{what} {text!r} is empty: {part} counts down; give 3,8 or 0-9")
        numbers += span
    if not numbers:
        raise InvalidRequest(f"{what} {text!r} is empty; give 3,8 or 0-9")
    return numbers


def read_conditions(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz under their names; raises InvalidRequest."""
    try:
        return read_arrays(path)
    except BundleError as error:
        raise InvalidRequest(f"{path} is not a readable .npz ({error.__cause__}); write it with numpy.savez") from error


def check_conditions(conditions: tuple[Port, ...], given: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], int]:
    """Every port's array in its dtype and shape, text padded under its mask, and the number of pictures B.

    A text without a mask is taken whole. Raises InvalidRequest.
    """
    ports = {port.name: port for port in conditions}
    unknown = sorted(given.keys() - ports.keys())
    if unknown:
        raise InvalidRequest(f"{unknown[0]!r} is not a condition of this bundle; it takes {', '.join(ports)}")
    values = dict(given)
    for name, mask_name in ((name, f"{name}_mask") for name in ports):
        if mask_name in ports and name in values:
            text = values[name] = as_array(name, values[name])
            mask = as_array(mask_name, values.get(mask_name, np.ones(text.shape[:2], np.float32)))
            if text.shape[1:2] != mask.shape[1:2]:
                raise InvalidRequest(
                    f"{mask_name} is {mask.shape}, its text is {text.shape}; give a number for each token"
                )
            values[mask_name] = mask
    missing = sorted(ports.keys() - values.keys())
    if missing:
        raise InvalidRequest(f"{missing[0]!r} is missing; this bundle takes {', '.join(ports)}")
    arrays = {name: _checked(port, values[name]) for name, port in ports.items()}
    counts = {name: len(array) for name, array in arrays.items()}
    pictures = max(counts.values())
    for name, count in counts.items():
        if count != pictures:
            raise InvalidRequest(f"{name!r} is for {count} pictures, another condition for {pictures}; give the same")
    return arrays, pictures


def row_conditions(spec: ModelSpec, asked: Mapping[str, NDArray[Any]], *, guided: bool) -> dict[str, NDArray[Any]]:
    """Checked conditions of B pictures -> those of the R rows that the graphs see, under the same names.

    A guided batch has the pictures' rows first, then as many that ask for nothing, or for what `negative_…` says.
    """
    rows = {}
    for port in spec.row_conditions:
        own = asked[port.name]
        if guided:
            other = asked.get(f"{NEGATIVE}{port.name}", own)
            null = port.below is not None and spec.null is not None
            own = np.concatenate([own, np.full_like(own, spec.null) if null else other])
        rows[port.name] = own
    return rows


def as_array(name: str, value: Any) -> NDArray[Any]:
    """`value` as an array; raises InvalidRequest when it is ragged."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InvalidRequest(f"{name} is ragged ({error}); give one shape") from error


def _checked(port: Port, value: Any) -> NDArray[Any]:
    """`value` in the port's dtype and shape, text padded to its length under a zero mask; raises InvalidRequest."""
    array = as_array(port.name, value)
    whole = port.dtype.startswith("int")
    if array.dtype.kind not in ("iu" if whole else "f"):
        raise InvalidRequest(f"{port.name} is {array.dtype}, expected {'whole numbers' if whole else 'floating point'}")
    if array.ndim != len(port.shape) or array.shape[0] < 1:
        raise InvalidRequest(f"{port.name} has shape {array.shape}, expected {port.shape}, B >= 1")
    if "text" in port.name and array.shape[1] < int(port.shape[1]):
        padding = [(0, 0)] * array.ndim
        padding[1] = (0, int(port.shape[1]) - array.shape[1])
        array = np.pad(array, padding)
    if array.shape[1:] != port.shape[1:]:
        raise InvalidRequest(f"{port.name} has shape {array.shape}, expected {port.shape}")
    if port.below is not None and (array.min() < 0 or array.max() >= port.below):
        wrong = next(int(v) for v in array.flat if not 0 <= v < port.below)
        raise InvalidRequest(f"{port.name} holds {wrong}, expected 0 to {port.below - 1}")
    if not whole and not (np.abs(array) <= np.finfo(port.dtype).max).all():
        raise InvalidRequest(f"{port.name} holds NaN or infinity")
    return array.astype(port.dtype)
