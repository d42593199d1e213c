"""Runs a graph in ONNX Runtime on a GPU: for a GPU without engines in the bundle, and to cross-check engines."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ilf_trt.contract.driver import extra_to_install
from ilf_trt.contract.ports import Graph
from ilf_trt.errors import DeviceLost, EngineError, IlfError, OutOfMemory, one_line
from ilf_trt.runtime.engine import Launch
from ilf_trt.runtime.onnx_file import OnnxFile
from ilf_trt.runtime.onnxruntime_engine import FATAL_ONLY, check_border
from ilf_trt.runtime.onnxruntime_import import import_onnxruntime

from .cuda import Gpu, Stream
from .cuda_provider import use_cuda
from .errors import device_error
from .scratch import Scratch

BFLOAT16 = 16  # TensorProto.DataType; numpy has no such type
ELEMENT_TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "int32": np.int32,
    "bfloat16": BFLOAT16,
}


class OnnxRuntimeCudaEngine:
    """A graph in an ONNX Runtime session on one stream.

    The library ties a session to its stream, so all users of this engine share that stream, one at a time. The
    library's memory pool is the scratch memory. A CUDA graph cannot hold the runs, because the library synchronises and
    allocates during a run.
    """

    capturable = False

    def __init__(self, graph: Graph, file: OnnxFile, *, gpu: Gpu, stream: Stream) -> None:
        """Load `file`; raises MissingDependency without the CUDA provider, EngineError, PortMismatch, OutOfMemory."""
        install = extra_to_install("onnxruntime-cuda")
        onnxruntime = import_onnxruntime(install)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        settings = {"user_compute_stream": str(stream.handle), "use_tf32": "0"}
        provider, providers = use_cuda(onnxruntime, options, gpu.ordinal, settings)
        try:
            self._session: Any = file.session(onnxruntime, options, providers)
        except Exception as error:
            raise _foreign_error(f"ONNX Runtime refused {file.path}", error, "build the bundle again") from error
        if provider not in self._session.get_providers():
            raise EngineError(f"ONNX Runtime could not start CUDA; pip install {install} for its libraries")
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._gpu = gpu
        self.graph = graph
        check_border(self._session, graph)

    def context(
        self, shapes: Mapping[str, tuple[int, ...]], stream: Stream, scratch: Scratch
    ) -> "OnnxRuntimeCudaContext":
        """A context for the session, which takes any shapes; `stream` must be the stream of the constructor."""
        if self._session is None:
            raise EngineError(f"{self.graph.name}: the engine is closed; load the bundle again")
        return OnnxRuntimeCudaContext(self._session, self._options, self.graph, self._gpu.ordinal)

    def close(self) -> None:
        self._session = None


class OnnxRuntimeCudaContext:
    """Runs one session on memory addresses."""

    scratch_bytes = 0

    def __init__(self, session: Any, options: Any, graph: Graph, ordinal: int) -> None:
        self._session = session
        self._options = options
        self._graph = graph
        self._ordinal = ordinal

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> Launch:
        binding = self._session.io_binding()
        for ports, bind in ((self._graph.inputs, binding.bind_input), (self._graph.outputs, binding.bind_output)):
            for port in ports:
                element = ELEMENT_TYPES[port.dtype]
                bind(port.name, "cuda", self._ordinal, element, shapes[port.name], addresses[port.name])
        session, options, name = self._session, self._options, self._graph.name

        def launch() -> None:
            try:
                session.run_with_iobinding(binding, options)
            except Exception as error:
                raise _foreign_error(f"ONNX Runtime failed in graph {name}", error, "") from error

        return launch

    def check_capturable(self) -> None:
        """Do nothing: `capturable` is False, so nobody captures these runs."""

    def close(self) -> None:
        self._session = None


def _foreign_error(what: str, error: Exception, hint: str) -> IlfError:
    gpu_error = device_error(what, error)
    if isinstance(gpu_error, OutOfMemory | DeviceLost):
        return gpu_error
    return EngineError(f"{what}: {one_line(error)}" + (f"; {hint}" if hint else ""))
