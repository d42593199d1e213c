"""Documents of others, JSON and TOML, read strictly: bounded, finite, without a key that is given twice.

A document becomes plain data first, then a type: `read_json` or `read_toml`, then `as_type`.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from ilf_trt.errors import InvalidRequest, one_line, shown
from ilf_trt.files import read_bytes

MOST_BYTES = 1 << 24
MOST_VALUES = 1 << 20
DEEPEST = 32
LONGEST_NUMBER = 40
LONGEST_TEXT = 1 << 20
VALUE_CHARS = 60
LONG_KEY = re.compile(rf"""(?:(?:(?<![\w-])[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{DEEPEST}}}""")

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
"""A whole number of things that there is at least one of."""
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
"""A whole number of things that there may be none of."""

T = TypeVar("T")


class DocumentError(InvalidRequest):
    """A document that is no strict JSON or TOML, or not of the type asked for; `reason` leaves out its path."""

    def __init__(self, reason: str, path: str | Path = "") -> None:
        super().__init__(f"{path} {reason}" if path else reason)
        self.reason = reason


def read_json(path: str | Path, *, most: int = MOST_BYTES, foreign: bool = False) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes; raises DocumentError, with the path and no advice.

    `foreign` lets through what diffusers and transformers write into their configs: Infinity, and whole numbers of more
    than 64 bits, such as 10^30 for a length without a limit.
    """
    with _named(path):
        return parse_json(_text(path, most), foreign=foreign)


def read_toml(path: str | Path, *, most: int = MOST_BYTES) -> dict[str, Any]:
    """The TOML table in a file of at most `most` bytes; raises DocumentError, with the path and no advice."""
    with _named(path):
        return parse_toml(_text(path, most))


def parse_json(text: str | bytes, *, foreign: bool = False) -> dict[str, Any]:
    """A JSON object; raises DocumentError for anything else, a key that is given twice, NaN, and what is too large."""
    with _readable("JSON"):
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=_real,
            parse_constant=_infinity if foreign else _refuse_constant,
        )
    return _object(value, foreign=foreign)


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML table; raises DocumentError for anything else, NaN, infinity, and what is too large."""
    if LONG_KEY.search(text):
        raise DocumentError(f"has a key of more than {DEEPEST} parts")  # tomllib takes the square of them in memory
    with _readable("TOML"):
        value = tomllib.loads(text, parse_float=_real)
    return _object(value)


def as_type(data: Mapping[str, Any], kind: type[T]) -> T:
    """Plain data as the dataclass `kind`, strictly.

    Raises DocumentError, which names the field, for a value of another type and for a key that `kind` does not know.
    """
    try:
        value = msgspec.convert(data, kind, strict=True)
    except (msgspec.ValidationError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DocumentError(f"has a field missing or wrong ({one_line(error)})") from error
    _refuse_unknown(data, value)
    return value


def canonical(data: Mapping[str, Any]) -> bytes:
    """The one way of writing plain data as JSON: sorted keys, no spaces, ASCII; what a digest is taken of."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Put the path into the errors of a block."""
    try:
        yield
    except DocumentError as error:
        raise DocumentError(error.reason, path) from error


@contextmanager
def _readable(language: str) -> Iterator[None]:
    """Turn what a parser raises into DocumentError."""
    try:
        yield
    except DocumentError:
        raise
    except RecursionError as error:
        raise DocumentError(f"is nested deeper than {DEEPEST} levels") from error
    except ValueError as error:
        raise DocumentError(f"is not readable {language}: {one_line(error)}") from error


def _text(path: str | Path, most: int) -> str:
    try:
        return read_bytes(path, most=most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(f"is not UTF-8 text: {one_line(error)}") from error
    except (OSError, ValueError) as error:
        raise DocumentError(f"cannot be read: {one_line(error)}") from error


def _object(value: Any, *, foreign: bool = False) -> dict[str, Any]:
    """Refuse what is no object, and numbers, texts and nesting that nothing of this package writes."""
    if not isinstance(value, dict):
        raise DocumentError(f"holds {type(value).__name__}, expected an object")
    level: list[Any] = [value]
    depth = values = 0
    while level:
        depth, values = depth + 1, values + len(level)
        if depth > DEEPEST:
            raise DocumentError(f"is nested deeper than {DEEPEST} levels")
        if values > MOST_VALUES:
            raise DocumentError(f"holds more than {MOST_VALUES} values")
        following: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                following += each.values()
                _check_texts(each)
            elif isinstance(each, list):
                following += each
            elif isinstance(each, str):
                _check_texts((each,))
            elif isinstance(each, int) and not (foreign or -(1 << 63) <= each < 1 << 64):
                raise DocumentError("holds a whole number of more than 64 bits")
            elif isinstance(each, float) and not (foreign or isfinite(each)):
                raise DocumentError("holds NaN or infinity")
        level = following
    return value


def _check_texts(texts: Any) -> None:
    for text in texts:
        if len(text) > LONGEST_TEXT:
            raise DocumentError(f"holds a text of {len(text)} characters, at most {LONGEST_TEXT} are read")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise DocumentError(f"gives {shown(twice, VALUE_CHARS)!r} twice")
    return table


def _whole(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise DocumentError(f"holds a number of {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    value = float(text) if len(text) <= LONGEST_NUMBER else float("nan")
    if not isfinite(value):
        raise DocumentError(f"holds the number {shown(text, VALUE_CHARS)}, which is not finite or too long")
    return value


def _infinity(text: str) -> float:
    return float(text) if text != "NaN" else float(_refuse_constant(text))


def _refuse_constant(text: str) -> Any:
    raise DocumentError(f"holds {text}, expected finite numbers")


def _refuse_unknown(data: Any, value: Any, where: str = "") -> None:
    """msgspec passes over keys that a dataclass does not have; here they are refused, at every depth."""
    names = getattr(type(value), "__dataclass_fields__", None)
    if names is not None and isinstance(data, Mapping):
        for name, inner in data.items():
            if name not in names:
                raise DocumentError(f"has an unknown field {shown(f'{where}{name}', VALUE_CHARS)!r}")
            _refuse_unknown(inner, getattr(value, name), f"{where}{name}.")
    elif isinstance(value, tuple | list) and isinstance(data, list | tuple):
        for index, (inner, each) in enumerate(zip(data, value, strict=True)):
            _refuse_unknown(inner, each, f"{where}{index}.")
    elif isinstance(value, dict) and isinstance(data, Mapping):
        for name, inner in data.items():
            if name in value:
                _refuse_unknown(inner, value[name], f"{where}{name}.")
