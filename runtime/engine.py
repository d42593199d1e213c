"""The seams between the runtime and the engine libraries."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from ilf_trt.contract.ports import Graph

Array = NDArray[Any]
Launch = Callable[[], None]


class Engine(Protocol):
    """One graph on the CPU; several sessions may share it."""

    @property
    def graph(self) -> Graph:
        """The border that the engine was checked against."""

    def bind(self, arrays: Mapping[str, Array]) -> Launch:
        """A call that runs the graph on just this memory, every port named in `arrays`; the memory must stay alive.

        Inputs are read and outputs written in place at each call.
        """

    def close(self) -> None:
        """Free the engine; no launch may be called afterwards."""
