"""A TOML table read into a dataclass, checked key by key."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from enum import StrEnum
from math import isfinite
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ilf_trt.contract.spec import Loop
from ilf_trt.errors import InvalidRequest

WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}


def parsed(kind: Any, table: Mapping[str, Any], where: str) -> Any:
    """A dataclass from a table, checked key by key, then by its own `check()`; raises InvalidRequest.

    `where` stands before a key in what an error says, such as `data.`.
    """
    hints, known = get_type_hints(kind), {one.name: one for one in fields(kind)}
    for name in table:
        if name not in known:
            raise InvalidRequest(f"{where}{name} is unknown{_nearest(name, list(known))}; it takes {', '.join(known)}")
    values = {}
    for name, one in known.items():
        if name in table:
            values[name] = _value(hints[name], table[name], f"{where}{name}")
        elif one.default is MISSING and one.default_factory is MISSING:
            raise InvalidRequest(f"{where}{name} is missing; set it in the recipe or with --set {where}{name}=…")
    made = kind(**values)
    made.check()
    return made


def _value(kind: Any, value: Any, name: str) -> Any:
    if get_origin(kind) is UnionType:
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    if kind is Loop:
        return Loop.parse(":".join(map(str, value)) if isinstance(value, list) else str(value))
    if is_dataclass(kind):
        return parsed(kind, _value(Mapping, value, name), f"{name}.")
    if (get_origin(kind) or kind) is Mapping:
        return value if isinstance(value, dict) else _mistyped(name, value, "a table")
    if issubclass(kind, StrEnum):
        if value not in list(kind):
            near = _nearest(str(value), [one.value for one in kind])
            raise InvalidRequest(f"{name} is {value!r}, it must be one of {', '.join(kind)}{near}")
        return kind(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not isfinite(value)):
        return _mistyped(name, value, WORDS[kind])
    return value


def _mistyped(name: str, value: Any, wanted: str) -> Any:
    raise InvalidRequest(f"{name} is {value!r}, it must be {wanted}")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
