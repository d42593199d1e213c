"""Runs a graph in ONNX Runtime on the CPU, the default engine."""

from collections.abc import Mapping
from typing import Any

from ilf_trt.contract.ports import Graph
from ilf_trt.errors import EngineError, PortMismatch, one_line

from .engine import Array, Launch
from .onnx_file import OnnxFile
from .onnxruntime_import import import_onnxruntime

FATAL_ONLY = 4
ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int32)": "int32",
}


class OnnxRuntimeEngine:
    """A graph in an ONNX Runtime session; several threads may launch it at once.

    Each graph has its own thread pool. After a run, a pool spins and takes the cores from the next graph, so this class
    stops the spinning: a trajectory of 12 blocks of width 384 takes 2.2 s instead of 3.7 s (2 cores, 10 steps). A
    global pool takes 1.8 to 2.0 s, but then the rest of the process could not open sessions with pools of their own.
    """

    def __init__(self, graph: Graph, file: OnnxFile, *, threads: int) -> None:
        """Load `file`; raises EngineError if the library refuses it, PortMismatch if it has other ports than `graph`.

        With `threads` 0, the library chooses the number of threads.
        """
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # see the docstring of the class
        try:
            self._session: Any = file.session(onnxruntime, options, ["CPUExecutionProvider"])
        except Exception as error:
            reason = one_line(error)
            raise EngineError(f"ONNX Runtime refused {file.path}: {reason}; build the bundle again") from error
        self.graph = graph
        check_border(self._session, graph)

    def bind(self, arrays: Mapping[str, Array]) -> Launch:
        if self._session is None:
            raise EngineError(f"{self.graph.name}: the engine is closed; load the bundle again")
        binding = self._session.io_binding()
        memory = []
        sides = ((self.graph.inputs, binding.bind_input), (self.graph.outputs, binding.bind_output))
        for ports, bind in sides:
            for port in ports:
                array = arrays[port.name]
                if not array.flags.c_contiguous or str(array.dtype) != port.dtype:
                    layout = "contiguous" if array.flags.c_contiguous else "strided"
                    raise PortMismatch(
                        f"{self.graph.name}: {port.name} is {layout} {array.dtype}, expected contiguous {port.dtype}"
                    )
                bind(port.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
                memory.append(array)
        return _Launch(self._session, binding, memory, self.graph.name)

    def close(self) -> None:
        self._session = None


def check_border(session: Any, graph: Graph) -> None:
    """Raise PortMismatch if the graph that ONNX Runtime loaded has other ports than the manifest."""
    sides = {"input": session.get_inputs(), "output": session.get_outputs()}
    got = {v.name: f"{side} {ORT_TYPES.get(v.type, v.type)}" for side, values in sides.items() for v in values}
    ports = {"input": graph.inputs, "output": graph.outputs}
    expected = {port.name: f"{side} {port.dtype}" for side, values in ports.items() for port in values}
    if got != expected:
        name = min(set(got.items()) ^ set(expected.items()))[0]
        raise PortMismatch(
            f"{graph.name}: port {name!r} is {got.get(name, 'missing')}, the manifest says "
            f"{expected.get(name, 'no such port')}; build the bundle again"
        )


class _Launch:
    """A run that is bound to memory; keeps that memory alive."""

    __slots__ = ("_binding", "_memory", "_name", "_run")

    def __init__(self, session: Any, binding: Any, memory: list[Array], name: str) -> None:
        self._run = session.run_with_iobinding
        self._binding = binding
        self._memory = memory
        self._name = name

    def __call__(self) -> None:
        try:
            self._run(self._binding)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed in graph {self._name}: {one_line(error)}") from error
