"""Splits the pictures of a request into runs that fit the bundle's batch, and pads a run that is too small."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.spec import BatchRange


@dataclass(frozen=True, slots=True)
class RunBatch:
    """Pictures `begin` to `end` of a request, in a run of `rows` pictures; copies of the last one pad the run."""

    begin: int
    end: int
    rows: int

    @property
    def pictures(self) -> int:
        """Number of pictures without the padding."""
        return self.end - self.begin

    def take(self, array: NDArray[Any]) -> NDArray[Any]:
        """array (pictures of the request, …) -> (rows, …): the part of this run, padded."""
        part = array[self.begin : self.end]
        if self.rows == len(part):
            return part
        return np.concatenate([part, np.repeat(part[-1:], self.rows - len(part), axis=0)])

    def take_all(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """`take` of every array."""
        return {name: self.take(array) for name, array in arrays.items()}


def run_batches(pictures: int, batch: BatchRange) -> Iterator[RunBatch]:
    """Runs of `batch.min` to `batch.max` pictures each."""
    for begin in range(0, pictures, batch.max):
        end = min(begin + batch.max, pictures)
        yield RunBatch(begin, end, max(end - begin, batch.min))
