"""ONNX Runtime on the CPU, the default engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ilf_trt.contract.ports import Graph
from ilf_trt.errors import EngineError, MissingDependency, PortMismatch
from ilf_trt.runtime.engine import Array, Launch

FATAL_ONLY = 4
ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int32)": "int32",
}


class OnnxRuntimeEngine:
    """A graph in an ONNX Runtime session; safe to launch from several threads.

    Graphs run in turn, each with its own thread pool, and a pool that spins on after its run takes the cores from the
    next: a trajectory of 12 blocks of width 384 takes 3.7 s so, 2.2 s with the spinning stopped (2 cores, 10 steps).
    A global pool (1.8 to 2.0 s) would forbid the rest of the process to open sessions of its own.
    """

    def __init__(self, graph: Graph, path: Path, *, threads: int) -> None:
        """Load `path`; raises EngineError when the library refuses it, PortMismatch when its border differs.

        `threads` 0 leaves the number to the library.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependency("onnxruntime is not installed; pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # see the class
        try:
            self._session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineError(f"ONNX Runtime refused {path}: {_line(error)}; build the bundle anew") from error
        self.graph = graph
        check_border(self._session, graph)

    def bind(self, arrays: Mapping[str, Array]) -> Launch:
        if self._session is None:
            raise EngineError(f"{self.graph.name}: the engine is closed; load the bundle again")
        binding = self._session.io_binding()
        held = []
        for port, place in [(p, binding.bind_input) for p in self.graph.inputs] + [
            (p, binding.bind_output) for p in self.graph.outputs
        ]:
            array = arrays[port.name]
            if not array.flags.c_contiguous or str(array.dtype) != port.dtype:
                raise PortMismatch(f"{self.graph.name}: {port.name} is {array.dtype}, expected contiguous {port.dtype}")
            place(port.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            held.append(array)
        return _Launch(self._session, binding, held, self.graph.name)

    def close(self) -> None:
        self._session = None


def check_border(session: Any, graph: Graph) -> None:
    """Raise PortMismatch when what ONNX Runtime loaded has other ports than the manifest says."""
    sides = {"input": session.get_inputs(), "output": session.get_outputs()}
    found = {v.name: f"{side} {ORT_TYPES.get(v.type, v.type)}" for side, values in sides.items() for v in values}
    ports = {"input": graph.inputs, "output": graph.outputs}
    wanted = {port.name: f"{side} {port.dtype}" for side, values in ports.items() for port in values}
    if found != wanted:
        name = min(set(found.items()) ^ set(wanted.items()))[0]
        raise PortMismatch(
            f"{graph.name}: port {name!r} is {found.get(name, 'missing')}, the manifest says "
            f"{wanted.get(name, 'no such port')}; build the bundle anew"
        )


class _Launch:
    """A bound run; holds the memory that it points to."""

    __slots__ = ("_binding", "_held", "_name", "_run")

    def __init__(self, session: Any, binding: Any, held: list[Array], name: str) -> None:
        self._run = session.run_with_iobinding
        self._binding = binding
        self._held = held
        self._name = name

    def __call__(self) -> None:
        try:
            self._run(self._binding)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed in graph {self._name}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
