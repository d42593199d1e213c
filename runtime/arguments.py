"""Checks arguments at the door: each function gives the plain value, or raises InvalidRequest in one line."""

import os
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from numbers import Integral, Number, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.arrays import MOST_NUMBERS
from ilf_trt.errors import InvalidRequest, one_line, told

MOST_PICTURES = MOST_NUMBERS
"""Of one request; as many as the command line takes labels."""
MOST_LISTED = 1 << 24
"""Numbers in nested lists, which Python keeps in ten times the memory of an array."""
MOST_DEEP = 8
LONGEST_S = 1e9

PLAIN = frozenset((int, float, bool, str))
ARRAY_PROTOCOLS = ("__array__", "__array_interface__", "__array_struct__")


def path_of(name: str, value: Any) -> Path:
    """A path of text."""
    try:
        text = os.fspath(value)
    except Exception:
        text = value
    if not isinstance(text, str) or "\0" in text:
        raise InvalidRequest(f"{name} is {told(value)}, expected the path of a folder")
    return Path(text)


def text_of(name: str, value: Any, expected: str) -> str:
    """A str."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is {told(value)}, expected {expected}")
    return value


def flag_of(name: str, value: Any) -> bool:
    """A bool."""
    if not isinstance(value, bool | np.bool_):
        raise InvalidRequest(f"{name} is {told(value)}, expected True or False")
    return bool(value)


def whole_of(name: str, value: Any, *, least: int = 1, most: int) -> int:
    """A whole number from `least` to `most`, of Python or numpy; no bool."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        raise InvalidRequest(f"{name} is {told(value)}, it must be a whole number from {least} to {most}")
    return int(value)


def real_of(name: str, value: Any, expected: str) -> float:
    """A finite real number, of Python or numpy; no bool."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else np.nan
    except OverflowError:
        number = np.inf
    if not np.isfinite(number):
        raise InvalidRequest(f"{name} is {told(value)}, it must be {expected}")
    return number


def seconds_of(name: str, value: Any) -> float | None:
    """Seconds, or None."""
    if value is None:
        return None
    seconds = real_of(name, value, "a number of seconds, at least 0, or None")
    if seconds < 0:
        raise InvalidRequest(f"{name} is {told(value)}, it must be a number of seconds, at least 0, or None")
    return min(seconds, LONGEST_S)


def listed(name: str, value: Any, expected: str) -> list[Any]:
    """The items of a list, a tuple, a generator and so on, in order, of at most MOST_PICTURES."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | bytearray | Mapping | Set):
        raise InvalidRequest(f"{name} is {told(value)}, expected {expected}")
    try:
        items = list(islice(value, MOST_PICTURES + 1))
    except Exception as error:  # the caller's iterator
        raise InvalidRequest(f"{name} cannot be read ({one_line(error, 100)}), expected {expected}") from error
    if len(items) > MOST_PICTURES:
        raise InvalidRequest(f"{name} has more than {MOST_PICTURES} items, the most of one request; make several")
    return items


def array_of(name: str, value: Any) -> NDArray[Any]:
    """An array of numpy, of a library that gives its arrays to numpy, or of nested lists of numbers."""
    if isinstance(value, list | tuple | range):
        value, _ = _plain_lists(name, value, MOST_LISTED, 1)
    elif not _is_array(value):
        raise InvalidRequest(f"{name} is {told(value)}, expected an array or a list of numbers")
    try:
        return np.asarray(value)
    except Exception as error:  # numpy's for a ragged list, and whatever the caller's object raises
        raise InvalidRequest(
            f"{name} is ragged or no array ({one_line(error, 100)}); give numbers in one shape"
        ) from error


def rows_of(name: str, value: Any) -> NDArray[Any]:
    """`array_of` with a row for each picture, at most MOST_PICTURES."""
    array = array_of(name, value)
    if not array.ndim:
        raise InvalidRequest(f"{name} has shape (), expected a row for each picture; give a list")
    if len(array) > MOST_PICTURES:
        raise InvalidRequest(f"{name} is for {len(array)} pictures, the most of one request is {MOST_PICTURES}")
    return array


def _is_array(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic | Number | str | bytes | bytearray | memoryview):
        return True
    try:
        return any(getattr(value, protocol, None) is not None for protocol in ARRAY_PROTOCOLS)
    except Exception:
        return False


def _plain_lists(name: str, value: Any, left: int, depth: int) -> tuple[Any, int]:
    """Lists of lists as Python's own kinds, and how many more numbers there may be.

    Refuses what numpy would read for minutes, or for ever. A subclass counts as what it holds: numpy would ask it.
    """
    if depth > MOST_DEEP:
        raise InvalidRequest(f"{name} has lists in lists, {MOST_DEEP} deep; give an array")
    kind = next(kind for kind in (list, tuple, range) if isinstance(value, kind))
    left -= kind.__len__(value)
    if left >= 0 and not set(map(type, kind.__iter__(value))) <= PLAIN:
        items = []
        for item in kind.__iter__(value):
            if isinstance(item, list | tuple | range):
                item, left = _plain_lists(name, item, left, depth + 1)
            elif not _is_array(item):
                raise InvalidRequest(f"{name} holds {told(item)}, expected numbers")
            items.append(item)
        return items, left
    if left < 0:
        raise InvalidRequest(f"{name} lists more than {MOST_LISTED} numbers; give an array of numpy")
    return value if type(value) is kind else list(kind.__iter__(value)), left
