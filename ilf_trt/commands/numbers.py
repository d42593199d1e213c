"""Numbers on the command line: whole ones and finite ones, as they are written; nothing is rounded."""

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from ilf_trt.errors import shown

WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
REAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
SHOWN_CHARS = 40


def whole_number(kind: Any, tokens: Sequence[Any]) -> int:
    """`"-12"` -> -12; raises ValueError for 10.5, 1e3, 1_000 and digits of other scripts."""
    text = tokens[0].value
    if not WHOLE.fullmatch(text):
        raise ValueError(f"{shown(text, SHOWN_CHARS)!r} is not a whole number; give one such as 12")
    return int(text)


def real_number(kind: Any, tokens: Sequence[Any]) -> float:
    """`"1.5"` -> 1.5; raises ValueError for what is not finite."""
    text = tokens[0].value
    value = float(text) if REAL.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise ValueError(f"{shown(text, SHOWN_CHARS)!r} is not a finite number; give one such as 1.5")
    return value


Whole = Annotated[int, Parameter(converter=whole_number)]
OptionalWhole = Annotated[int | None, Parameter(converter=whole_number)]
Real = Annotated[float, Parameter(converter=real_number)]
OptionalReal = Annotated[float | None, Parameter(converter=real_number)]
