"""The arena: where each tensor of a trajectory lies in one allocation on a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ilf_trt.runtime.gpu.cuda import ALIGNMENT
from ilf_trt.runtime.route import PREDICTIONS, Route, Tensor

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}


@dataclass(frozen=True, slots=True)
class Slot:
    """Bytes of one tensor. Rows lie `pitch` apart, so that each is aligned; `dense` is where a graph that writes all
    rows at once finds them one after another, when that is not the same.
    """

    offset: int
    size_bytes: int
    row_bytes: int
    pitch: int
    rows: int
    dense: int | None


@dataclass(frozen=True, slots=True)
class Arena:
    """`staged_bytes` from the start are what the host writes for each picture, `cleared` what begins at zero."""

    slots: Mapping[str, Slot]
    staged_bytes: int
    cleared: tuple[int, int]
    size_bytes: int


def arena_of(route: Route) -> Arena:
    """Lay out a route's tensors: what the host writes first, so that one copy brings it all; then what is cleared."""
    staged, fixed = list(route.inputs), list(route.fixed)
    others = [name for name in route.tensors if name not in (*staged, *fixed, *PREDICTIONS)]
    slots: dict[str, Slot] = {}
    end = 0

    def place(names: list[str]) -> tuple[int, int]:
        nonlocal end
        begin = end
        for name in names:
            slots[name] = _slot(route.tensors[name], end, written_whole=name in others)
            end = _aligned(end + slots[name].size_bytes)
            if slots[name].dense is not None:
                end = _aligned(end + slots[name].row_bytes * slots[name].rows)
        return begin, end - begin

    _, staged_bytes = place(staged)
    cleared = place(list(PREDICTIONS))
    place(fixed)
    place(others)
    return Arena(slots, staged_bytes, cleared, end)


def _slot(tensor: Tensor, offset: int, *, written_whole: bool) -> Slot:
    rows = tensor.shape[0] if tensor.by_row else 1
    row_bytes = prod(tensor.shape) * ITEM_BYTES[tensor.dtype] // rows
    pitch = _aligned(row_bytes) if tensor.by_row else row_bytes
    size_bytes = pitch * rows
    padded = tensor.by_row and written_whole and pitch != row_bytes
    return Slot(offset, size_bytes, row_bytes, pitch, rows, _aligned(offset + size_bytes) if padded else None)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
