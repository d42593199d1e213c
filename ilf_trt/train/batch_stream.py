"""The batches that training reads: a batch, the protocol of a stream, and the stream over rows in memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ilf_trt.errors import InvalidRequest

from .shuffle import Shuffle


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows: x0 (B, C, H, W), and the conditions of the same rows under their port names."""

    x0: Tensor
    conditions: dict[str, Tensor]

    def part(self, rows: slice, device: torch.device) -> "Batch":
        """Some of the rows, on `device`."""
        conditions = {name: value[rows].to(device, non_blocking=True) for name, value in self.conditions.items()}
        return Batch(self.x0[rows].to(device, non_blocking=True), conditions)

    def without_condition(self, drop_mask: Tensor, null: Mapping[str, Tensor]) -> "Batch":
        """Replace the conditions of the rows in `drop_mask` (B,) by `null`, which has one row of each."""
        conditions = dict(self.conditions)
        for name, null_row in null.items():
            value = conditions[name]
            mask = drop_mask.reshape(-1, *[1] * (value.ndim - 1))
            conditions[name] = torch.where(mask, null_row.to(value), value)
        return Batch(self.x0, conditions)


StreamItem = tuple[int, Sequence[str], Batch]
"""An iteration, counted from 1; the keys of this process's rows; the rows."""


class BatchStream(Protocol):
    """A source of batches. An iteration has the same rows in every run; each process gets its own part of them."""

    @property
    def null(self) -> Mapping[str, Tensor] | None:
        """The conditions of one row that asks for nothing; None if the data has none, as data with labels."""

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
            conditions = {name: value[rows] for name, value in self.rows.conditions.items()}
            yield iteration, [str(int(row)) for row in rows], Batch(self.rows.x0[rows], conditions)
            iteration += 1
