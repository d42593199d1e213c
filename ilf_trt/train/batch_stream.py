"""What training takes from data: a stream of batches that can be opened at any iteration, and one from memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ilf_trt.errors import InvalidRequest
from ilf_trt.train.shuffle import Order


@dataclass(frozen=True, slots=True)
class Batch:
    """x0 (B, C, H, W) and the backbone's own arguments for B rows."""

    x0: Tensor
    call: dict[str, Any]

    def part(self, rows: slice, device: torch.device) -> "Batch":
        """Some of the rows, on `device`."""
        moved: dict[str, Any] = _each(self.call, lambda value: value[rows].to(device, non_blocking=True))
        return Batch(self.x0[rows].to(device, non_blocking=True), moved)

    def without(self, dropped: Tensor, null: Mapping[str, Tensor]) -> "Batch":
        """The rows in `dropped` (B,) ask for nothing: their arguments are those of `null`, one row each."""
        call = dict(self.call)
        for name, nothing in null.items():
            value = call[name]
            mask = dropped.reshape(-1, *[1] * (value.ndim - 1))
            call[name] = torch.where(mask, nothing.to(value), value)
        return Batch(self.x0, call)


Pulled = tuple[int, Sequence[str], Batch]
"""An iteration, counted from 1, the keys of this process's rows, and the rows."""


class Feed(Protocol):
    """The same iteration gives the same rows in every run; process `rank` of `world` gets its stretch of them."""

    @property
    def null(self) -> Mapping[str, Tensor] | None:
        """The arguments of one row that asks for nothing, where the backbone itself does not know them."""

    def stream(self, *, start_iteration: int, rank: int, world: int) -> Iterator[Pulled]:
        """Endless from `start_iteration`."""


class MemoryFeed:
    """All rows in memory; every epoch has its own order, a pure function of the seed."""

    def __init__(self, rows: Batch, *, global_batch: int, seed: int, null: Mapping[str, Tensor] | None = None) -> None:
        if not len(rows.x0):
            raise InvalidRequest("the data holds no picture; give at least one")
        self.rows, self.global_batch = rows, global_batch
        self.null, self.order = null, Order(len(rows.x0), seed)

    def stream(self, *, start_iteration: int, rank: int, world: int) -> Iterator[Pulled]:
        size = self.global_batch // world
        iteration = start_iteration
        while True:
            first = (iteration - 1) * self.global_batch + rank * size
            chosen = torch.from_numpy(self.order.rows(first, size))
            call: dict[str, Any] = _each(self.rows.call, lambda value: value[chosen])  # noqa: B023
            yield iteration, [str(int(row)) for row in chosen], Batch(self.rows.x0[chosen], call)
            iteration += 1


def _each(value: Any, change: Any) -> Any:
    """`change` on every tensor of nested tables."""
    if isinstance(value, Mapping):
        return {name: _each(inner, change) for name, inner in value.items()}
    return change(value) if isinstance(value, Tensor) else value
