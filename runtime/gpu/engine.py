"""The seam between the runtime and an engine library on a GPU."""

from collections.abc import Mapping
from typing import Protocol

from ilf_trt.contract.ports import Graph
from ilf_trt.runtime.engine import Launch
from ilf_trt.runtime.gpu.cuda import Memory, Stream


class DeviceEngine(Protocol):
    """One graph on a GPU, its weights there once; several sessions may share it.

    `scratch_bytes` is what any run may need beside its ports; `capturable`, whether its library lets runs become part
    of a CUDA graph at all.
    """

    capturable: bool

    @property
    def graph(self) -> Graph:
        """The border that the engine was checked against."""

    @property
    def scratch_bytes(self) -> int: ...

    def context(self, shapes: Mapping[str, tuple[int, ...]], stream: Stream, scratch: Memory | None) -> "DeviceContext":
        """Something that runs the graph on `stream`, in `scratch`, with inputs of just these shapes."""

    def close(self) -> None:
        """Free the engine; its contexts must be closed."""


class DeviceContext(Protocol):
    """An engine with its shapes set."""

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> Launch:
        """A call that puts one run on the stream, every port at its address; it waits for nothing."""

    def check_capturable(self) -> None:
        """Raise EngineError when the library says that these runs cannot become part of a CUDA graph."""

    def close(self) -> None:
        """Free the context; no launch may be called afterwards."""
