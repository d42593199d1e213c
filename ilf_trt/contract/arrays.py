"""Arrays and lists of numbers as callers write them: in a file, in a text, as any sequence."""

import re
import zipfile
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.errors import InvalidRequest, one_line, shown
from ilf_trt.files import open_regular

MOST_BYTES = 1 << 30
MOST_ARRAYS = 4096
MOST_DIMENSIONS = 8
HEADER_CHARS = 2000
MOST_NUMBERS, MOST_DIGITS = 1 << 16, 20
SPAN = re.compile(r"(-?[0-9]{1,20})(?:-(-?[0-9]{1,20}))?")
TEXT_CHARS = 60
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    RuntimeError,
    SyntaxError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise for a file that is no whole .npz."""


def read_npz(file: IO[bytes], *, most: int = MOST_BYTES) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz under their names, of at most `most` bytes together.

    Every size is read and held against the limit before memory is taken. Raises ValueError and what else is UNREADABLE.
    """
    arrays: dict[str, NDArray[Any]] = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) > MOST_ARRAYS:
            raise ValueError(f"it holds {len(members)} arrays, at most {MOST_ARRAYS} are read")
        total_bytes = sum(member.file_size for member in members)
        if total_bytes > most:
            raise ValueError(f"it holds {total_bytes} bytes, at most {most} are read")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name == member.filename or name in arrays:
                raise ValueError(f"{shown(member.filename, 60)!r} is no .npy, or there are two")
            with archive.open(member) as opened:
                arrays[name] = read_npy(opened, size_bytes=member.file_size)
    return arrays


def read_npy(file: IO[bytes], *, size_bytes: int) -> NDArray[Any]:
    """The array of an .npy of `size_bytes`; raises ValueError and what else is UNREADABLE.

    Its header must ask for exactly the bytes that follow it.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it is an .npy of version {version}, expected 1 or 2")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file, max_header_size=HEADER_CHARS)
    if dtype.hasobject or dtype.fields is not None or dtype.kind not in "biuf":
        raise ValueError(f"it holds {shown(str(dtype), 60)}, expected numbers")
    if len(shape) > MOST_DIMENSIONS or any(side < 0 for side in shape):
        raise ValueError(f"its shape {shown(str(shape), 60)} is not one of at most {MOST_DIMENSIONS} sides")
    wanted = prod(shape) * dtype.itemsize
    if wanted > size_bytes:
        raise ValueError(f"its header asks for {wanted} bytes, the file has {size_bytes}")
    content = bytearray(file.read(wanted + 1))
    if len(content) != wanted:
        raise ValueError(f"its header asks for {wanted} bytes, {len(content)} or more follow")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def write_npz(place: Path | IO[bytes], arrays: Mapping[str, Any]) -> None:
    """Write arrays of numbers under their names; raises ValueError for other ones, which numpy would pickle.

    numpy 2.0 has no `allow_pickle` here: it would write that as one more array.
    """
    if others := [name for name, array in arrays.items() if np.asarray(array).dtype.hasobject]:
        raise ValueError(f"{shown(others[0], TEXT_CHARS)!r} holds Python objects, expected numbers")
    np.savez(place, **arrays)


def read_conditions(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a caller's .npz under their names; raises InvalidRequest."""
    try:
        with open_regular(path) as file:
            return read_npz(file)
    except UNREADABLE as error:
        reason = one_line(error)
        raise InvalidRequest(f"{path} is not a readable .npz ({reason}); write it with numpy.savez") from error


def mismatch(arrays: Mapping[str, NDArray[Any]], wanted: Mapping[str, tuple[tuple[int, ...], str]]) -> str | None:
    """The first name of `wanted` (shape and dtype by name) that `arrays` lack or have otherwise; else None."""
    for name, (shape, dtype) in wanted.items():
        array = arrays.get(name)
        if array is None or array.shape != shape or str(array.dtype) != dtype:
            return name
    return None


def is_finite(array: NDArray[Any]) -> bool:
    """Whether an array holds neither NaN nor infinity."""
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def as_array(name: str, value: Any) -> NDArray[Any]:
    """`value` as an array; raises InvalidRequest when it is ragged."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InvalidRequest(f"{name} is ragged ({one_line(error)}); give one shape") from error


def is_digits(text: str) -> bool:
    """Whether a text is a whole number of at most 20 ASCII digits."""
    return text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS


def numbers_of(text: str, what: str) -> list[int]:
    """`"3,8"` -> [3, 8]; `"0-9"` -> 0 to 9; `"-1,2"` -> [-1, 2], at most `MOST_NUMBERS`.

    Raises InvalidRequest, which calls them `what`.
    """
    numbers: list[int] = []
    for part in text.split(","):
        ends = SPAN.fullmatch(part.strip())
        if ends is None:
            raise InvalidRequest(f"{what} {shown(text, TEXT_CHARS)!r} is not a list of numbers; give 3,8 or 0-9")
        span = range(int(ends[1]), int(ends[2] or ends[1]) + 1)
        if not span:
            raise InvalidRequest(
                f"{what} {shown(text, TEXT_CHARS)!r} is empty: {part.strip()} counts down; give 3,8 or 0-9"
            )
        if span.stop - span.start > MOST_NUMBERS - len(numbers):
            raise InvalidRequest(
                f"{what} {shown(text, TEXT_CHARS)!r} are more than {MOST_NUMBERS} numbers; give fewer at once"
            )
        numbers += span
    return numbers
