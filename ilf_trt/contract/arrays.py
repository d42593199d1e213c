"""Arrays and lists of numbers as callers write them: in a file, in a text, as any sequence."""

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.errors import BundleError, InvalidRequest, one_line, shown

MOST_NUMBERS = 1 << 16
SPAN = re.compile(r"(-?[0-9]{1,20})(?:-(-?[0-9]{1,20}))?")
TEXT_CHARS = 60

UNREADABLE_NPZ = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise for a file that is no whole .npz."""


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz of a bundle; raises BundleError."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return dict(file)
    except UNREADABLE_NPZ as error:
        raise BundleError(f"{path} cannot be read ({one_line(error)}); build the bundle again") from error


def read_conditions(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a caller's .npz under their names; raises InvalidRequest."""
    try:
        return read_arrays(path)
    except BundleError as error:
        reason = one_line(error.__cause__ or error)
        raise InvalidRequest(f"{path} is not a readable .npz ({reason}); write it with numpy.savez") from error


def as_array(name: str, value: Any) -> NDArray[Any]:
    """`value` as an array; raises InvalidRequest when it is ragged."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InvalidRequest(f"{name} is ragged ({one_line(error)}); give one shape") from error


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
