"""How many pictures become runs of a bundle's batch: split where they are too many, filled up where too few."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.spec import BatchRange


@dataclass(frozen=True, slots=True)
class Chunk:
    """Pictures `begin` to `end` of a request, in a run of `rows` pictures; those past `end` are copies of the last."""

    begin: int
    end: int
    rows: int

    @property
    def pictures(self) -> int:
        return self.end - self.begin

    def of(self, array: NDArray[Any]) -> NDArray[Any]:
        """The chunk's part of an array over all pictures, filled up."""
        part = array[self.begin : self.end]
        if self.rows == len(part):
            return part
        return np.concatenate([part, np.repeat(part[-1:], self.rows - len(part), axis=0)])

    def of_all(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {name: self.of(array) for name, array in arrays.items()}


def chunks_of(pictures: int, batch: BatchRange) -> Iterator[Chunk]:
    """Runs of at most `batch.max` pictures, and at least `batch.min`."""
    for begin in range(0, pictures, batch.max):
        end = min(begin + batch.max, pictures)
        yield Chunk(begin, end, max(end - begin, batch.min))
