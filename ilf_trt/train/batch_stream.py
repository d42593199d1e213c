"""The batches that training reads: a batch, the protocol of a stream, and the stream over rows in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ilf_trt.errors import InvalidRequest
from ilf_trt.train.shuffle import Shuffle


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows: x0 (B, C, H, W), and `call`, the backbone's other arguments for the same rows."""

    x0: Tensor
    call: dict[str, Any]

    def part(self, rows: slice, device: torch.device) -> "Batch":
        """Some of the rows, on `device`."""
        call: dict[str, Any] = _map_tensors(self.call, lambda value: value[rows].to(device, non_blocking=True))
        return Batch(self.x0[rows].to(device, non_blocking=True), call)

    def without_condition(self, drop_mask: Tensor, null: Mapping[str, Tensor]) -> "Batch":
        """Replace the condition of the rows in `drop_mask` (B,) by `null`, which has one row of each argument."""
        call = dict(self.call)
        for name, null_row in null.items():
            value = call[name]
            mask = drop_mask.reshape(-1, *[1] * (value.ndim - 1))
            call[name] = torch.where(mask, null_row.to(value), value)
        return Batch(self.x0, call)


StreamItem = tuple[int, Sequence[str], Batch]
"""An iteration, counted from 1; the keys of this process's rows; the rows."""


class BatchStream(Protocol):
    """A source of batches. An iteration has the same rows in every run; each process gets its own part of them."""

    @property
    def null(self) -> Mapping[str, Tensor] | None:
        """The condition of one row that asks for nothing; None if the backbone itself knows it."""

    def batches(self, *, start_iteration: int, rank: int, world: int) -> Iterator[StreamItem]:
        """The batches of process `rank` of `world`, from `start_iteration` on, without end."""


class MemoryStream:
    """A stream over rows in memory, in the order of `Shuffle`. Raises InvalidRequest if there is no row."""

    def __init__(self, rows: Batch, *, global_batch: int, seed: int, null: Mapping[str, Tensor] | None = None) -> None:
        if not len(rows.x0):
            raise InvalidRequest("the data holds no picture; give at least one")
        self.rows, self.global_batch = rows, global_batch
        self.null, self.shuffle = null, Shuffle(len(rows.x0), seed)

    def batches(self, *, start_iteration: int, rank: int, world: int) -> Iterator[StreamItem]:
        size = self.global_batch // world
        iteration = start_iteration
        while True:
            first = (iteration - 1) * self.global_batch + rank * size
            rows = torch.from_numpy(self.shuffle.rows(first, size))
            call: dict[str, Any] = _map_tensors(self.rows.call, lambda value: value[rows])  # noqa: B023
            yield iteration, [str(int(row)) for row in rows], Batch(self.rows.x0[rows], call)
            iteration += 1


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to every tensor of nested tables."""
    if isinstance(value, Mapping):
        return {name: _map_tensors(inner, change) for name, inner in value.items()}
    return change(value) if isinstance(value, Tensor) else value
