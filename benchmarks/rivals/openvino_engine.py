"""Runs a graph in OpenVINO on the CPU, behind the runtime's own trajectory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ilf_trt.contract.ports import Graph
from ilf_trt.errors import EngineError, MissingDependency, PortMismatch, one_line
from ilf_trt.runtime.engine import Array, Launch

CPU = "CPU"
INSTALL = "pip install openvino"


def import_openvino() -> Any:
    """The module; raises MissingDependency, which says how to install it."""
    try:
        import openvino
    except ImportError as error:
        raise MissingDependency(f"openvino is not installed; {INSTALL}") from error
    return openvino


def settings_of(threads: int, precision: str) -> dict[str, Any]:
    """OpenVINO's settings for one request at a time; `precision` is f32 or bf16."""
    return {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}


class OpenVinoEngine:
    """A graph in OpenVINO's own runtime, compiled once for each set of shapes that is bound. One thread at a time."""

    def __init__(self, graph: Graph, path: Path, *, threads: int, precision: str = "f32") -> None:
        """Read the ONNX file at `path`; raises MissingDependency, EngineError if OpenVINO refuses the file."""
        self._openvino = import_openvino()
        self._core = self._openvino.Core()
        self._path = path
        self._settings = settings_of(threads, precision)
        self._compiled: dict[tuple[tuple[int, ...], ...], Any] | None = {}
        self.graph = graph
        self._read()

    def bind(self, arrays: Mapping[str, Array]) -> Launch:
        """See `Engine.bind`. Raises PortMismatch for another layout or dtype, EngineError if OpenVINO refuses it."""
        if self._compiled is None:
            raise EngineError(f"{self.graph.name}: the engine is closed; load the bundle again")
        for port in (*self.graph.inputs, *self.graph.outputs):
            array = arrays[port.name]
            if not array.flags.c_contiguous or str(array.dtype) != port.dtype:
                layout = "contiguous" if array.flags.c_contiguous else "strided"
                raise PortMismatch(
                    f"{self.graph.name}: {port.name} is {layout} {array.dtype}, expected contiguous {port.dtype}"
                )
        shapes = tuple(arrays[port.name].shape for port in self.graph.inputs)
        try:
            if shapes not in self._compiled:
                self._compiled[shapes] = self._compile(shapes)
            request = self._compiled[shapes].create_infer_request()
            for port in (*self.graph.inputs, *self.graph.outputs):
                request.set_tensor(port.name, self._openvino.Tensor(arrays[port.name], shared_memory=True))
        except RuntimeError as error:
            raise EngineError(f"OpenVINO refused graph {self.graph.name}: {one_line(error)}") from error
        return _Launch(request, dict(arrays), self.graph.name)

    def close(self) -> None:
        self._compiled = None

    def _compile(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        model = self._read()
        model.reshape({port.name: list(shape) for port, shape in zip(self.graph.inputs, shapes, strict=True)})
        return self._core.compile_model(model, CPU, self._settings)

    def _read(self) -> Any:
        try:
            return self._core.read_model(self._path)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO refused {self._path}: {one_line(error)}") from error


class _Launch:
    """A request that is bound to memory; keeps that memory alive."""

    __slots__ = ("_memory", "_name", "_request")

    def __init__(self, request: Any, memory: Mapping[str, Array], name: str) -> None:
        self._request = request
        self._memory = memory
        self._name = name

    def __call__(self) -> None:
        try:
            self._request.start_async()  # infer() would copy the outputs
            self._request.wait()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed in graph {self._name}: {one_line(error)}") from error
