"""What the runtime expects of an engine library on a GPU."""

from collections.abc import Mapping
from typing import Protocol

from ilf_trt.contract.ports import Graph
from ilf_trt.runtime.engine import Launch

from .cuda import Stream
from .scratch import Scratch


class DeviceEngine(Protocol):
    """One graph on a GPU, with one copy of its weights; several sessions may share it.

    `capturable` says whether the library allows its runs in a CUDA graph.
    """

    capturable: bool

    @property
    def graph(self) -> Graph:
        """The ports that the engine was checked against."""

    def context(self, shapes: Mapping[str, tuple[int, ...]], stream: Stream, scratch: Scratch) -> "DeviceContext":
        """A context that runs the graph on `stream`, in `scratch`, with inputs of exactly these shapes."""

    def close(self) -> None:
        """Free the engine; its contexts must be closed."""


class DeviceContext(Protocol):
    """An engine with fixed shapes."""

    scratch_bytes: int
    """Scratch memory that its runs need; whoever runs it has reserved as much."""

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> Launch:
        """A call that puts one run on the stream, with every port at its address; the call does not wait."""

    def check_capturable(self) -> None:
        """Raise EngineError if the library says that these runs cannot be part of a CUDA graph."""

    def close(self) -> None:
        """Free the context; nobody may call its launches afterwards."""
