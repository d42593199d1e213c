"""What the runtime expects of an engine library, and the names of the libraries."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Protocol

from numpy.typing import NDArray

from ilf_trt.contract.ports import Graph
from ilf_trt.errors import InvalidRequest, told

from .arguments import text_of

Array = NDArray[Any]
Launch = Callable[[], None]


class EngineKind(StrEnum):
    """What runs the graphs: an engine library that the bundle was compiled for, or ONNX Runtime."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    ONNXRUNTIME = "onnxruntime"

    @classmethod
    def parse(cls, text: str) -> "EngineKind":
        """The kind with this name; raises InvalidRequest for another name."""
        known = f"one of {', '.join(cls)}"
        name = text_of("engine", text, known)
        try:
            return cls(name)
        except ValueError as error:
            raise InvalidRequest(f"engine {told(name)} is unknown; it is {known}") from error


class Engine(Protocol):
    """One graph on the CPU; several sessions may share it."""

    @property
    def graph(self) -> Graph:
        """The ports that the engine was checked against."""

    def bind(self, arrays: Mapping[str, Array]) -> Launch:
        """A call that runs the graph on exactly these arrays, one for each port; the caller keeps them alive.

        Each call reads the inputs and writes the outputs in place.
        """

    def close(self) -> None:
        """Free the engine; nobody may call its launches afterwards."""
