"""The arena: one allocation on a GPU, and the place of each tensor of a trajectory in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ilf_trt.contract.ports import ITEM_BYTES
from ilf_trt.runtime.route import PREDICTIONS, Route, Tensor

from .cuda import ALIGNMENT


@dataclass(frozen=True, slots=True)
class Slot:
    """The bytes of one tensor.

    Rows lie `pitch` bytes apart, so that each row is aligned. A graph that writes all rows at once needs them one after
    another: if `pitch` leaves gaps, `dense` is the offset of a second area without gaps, otherwise it is None.
    """

    offset: int
    size_bytes: int
    row_bytes: int
    pitch: int
    rows: int
    dense: int | None


@dataclass(frozen=True, slots=True)
class Arena:
    """The slots of all tensors.

    The host writes the first `input_bytes` for each generation. `zeros` is (offset, size in bytes) of the tensors that
    are zero at the start of a generation.
    """

    slots: Mapping[str, Slot]
    input_bytes: int
    zeros: tuple[int, int]
    size_bytes: int


def arena_of(route: Route) -> Arena:
    """Lay out a route's tensors: first those that the host writes, so that one copy uploads them; then the zeros."""
    inputs, constants = list(route.inputs), list(route.fixed)
    others = [name for name in route.tensors if name not in (*inputs, *constants, *PREDICTIONS)]
    slots: dict[str, Slot] = {}
    end = 0

    def place(names: list[str]) -> tuple[int, int]:
        nonlocal end
        begin = end
        for name in names:
            slots[name] = _slot(route.tensors[name], end, needs_dense_rows=name in others)
            end = _align(end + slots[name].size_bytes)
            if slots[name].dense is not None:
                end = _align(end + slots[name].row_bytes * slots[name].rows)
        return begin, end - begin

    _, input_bytes = place(inputs)
    zeros = place(list(PREDICTIONS))
    place(constants)
    place(others)
    return Arena(slots, input_bytes, zeros, end)


def _slot(tensor: Tensor, offset: int, *, needs_dense_rows: bool) -> Slot:
    rows = tensor.shape[0] if tensor.by_row else 1
    row_bytes = prod(tensor.shape) * ITEM_BYTES[tensor.dtype] // rows
    pitch = _align(row_bytes) if tensor.by_row else row_bytes
    size_bytes = pitch * rows
    has_gaps = tensor.by_row and pitch != row_bytes
    dense = _align(offset + size_bytes) if has_gaps and needs_dense_rows else None
    return Slot(offset, size_bytes, row_bytes, pitch, rows, dense)


def _align(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
