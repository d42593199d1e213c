"""TOML tables and the dataclasses that they describe: read with checks, change one field, write back as plain data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from enum import StrEnum
from math import isfinite
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ilf_trt.contract.document import DocumentError, parse_toml
from ilf_trt.contract.spec import Loop
from ilf_trt.errors import InvalidRequest, shown, told

TYPE_WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
VALUE_CHARS = 60
T = TypeVar("T")


def parse(kind: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """Make the dataclass `kind` from a table, then call its `check()`.

    `where` is the prefix of a key in messages, such as `data.`. Raises InvalidRequest for a key that is unknown,
    missing or of the wrong type, and whatever `check()` raises.
    """
    options: Any = kind
    hints, by_name = get_type_hints(kind), {field.name: field for field in fields(options)}
    for name in table:
        if name not in by_name:
            hint = did_you_mean(name, list(by_name))
            raise InvalidRequest(f"{where}{shown(name, VALUE_CHARS)} is unknown{hint}; it takes {', '.join(by_name)}")
    values = {}
    for name, field in by_name.items():
        if name in table:
            values[name] = _value(hints[name], table[name], f"{where}{name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise InvalidRequest(f"{where}{name} is missing; set it in the recipe or with --set {where}{name}=…")
    instance = options(**values)
    instance.check()
    return instance


def set_field(table: dict[str, Any], change: str) -> None:
    """Apply `SECTION.KEY=VALUE` to a table in place; the value is TOML or else text. Raises InvalidRequest."""
    name, separator, text = change.partition("=")
    if not separator or not name.strip():
        raise InvalidRequest(f"--set {told(change)} is not SECTION.KEY=VALUE, such as optimisation.lr=1e-5")
    try:
        value = parse_toml(f"value = {text}")["value"]
    except DocumentError:
        value = text.strip()
    *sections, key = name.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise InvalidRequest(
                f"--set {told(change)}: {shown(section, VALUE_CHARS)} is no section; give SECTION.KEY=VALUE"
            )
    table[key] = value


def plain(value: Any) -> Any:
    """JSON data from `dataclasses.asdict`; `parse` reads it back."""
    if isinstance(value, dict):
        if value.keys() == {"begin", "end"}:
            return f"{value['begin']}:{value['end']}"
        return {name: plain(inner) for name, inner in value.items()}
    return value.value if isinstance(value, StrEnum) else value


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested tables with its full key, such as `optimisation.lr`."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_at_least(low: int, where: str, **values: float) -> None:
    """Raises InvalidRequest for the first value below `low`; `where` is the prefix of its name."""
    for name, value in values.items():
        if value < low:
            raise InvalidRequest(f"{where}{name} is {value}, it must be at least {low}")


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """The end of a message that names the closest of `names`, or nothing."""
    matches = get_close_matches(name, names, n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def _value(kind: Any, value: Any, name: str) -> Any:
    if get_origin(kind) is UnionType:
        (kind,) = (member for member in get_args(kind) if member is not NoneType)
    if kind is Loop:
        return Loop.parse(":".join(map(str, value)) if isinstance(value, list) else str(value))
    if is_dataclass(kind):
        section: Any = kind
        return parse(section, _value(Mapping, value, name), f"{name}.")
    if (get_origin(kind) or kind) is Mapping:
        return value if isinstance(value, dict) else _refuse_type(name, value, "a table")
    if issubclass(kind, StrEnum):
        if value not in list(kind):
            hint = did_you_mean(str(value), [member.value for member in kind])
            raise InvalidRequest(f"{name} is {told(value)}, it must be one of {', '.join(kind)}{hint}")
        return kind(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not isfinite(value)):
        return _refuse_type(name, value, TYPE_WORDS[kind])
    return value


def _refuse_type(name: str, value: Any, expected: str) -> Any:
    raise InvalidRequest(f"{name} is {told(value)}, it must be {expected}")
