"""A bundle on one GPU: its engines and constants there once, and sessions that run them on streams of their own."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from math import prod
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.ports import Graph, Port
from ilf_trt.contract.target import Library
from ilf_trt.errors import DeviceError
from ilf_trt.runtime.engine import Array
from ilf_trt.runtime.gpu.arena import ITEM_BYTES
from ilf_trt.runtime.gpu.call import DeviceCall
from ilf_trt.runtime.gpu.compatibility import EngineKind, library_for
from ilf_trt.runtime.gpu.cuda import Gpu, Memory, Stream, upload
from ilf_trt.runtime.gpu.engine import DeviceEngine
from ilf_trt.runtime.gpu.errors import translated
from ilf_trt.runtime.gpu.onnxruntime_cuda import OnnxRuntimeCudaEngine
from ilf_trt.runtime.gpu.tensorrt import TensorRT
from ilf_trt.runtime.gpu.trajectory import DeviceTrajectory
from ilf_trt.runtime.route import route_of
from ilf_trt.runtime.session import KEPT_TRAJECTORIES, Session
from ilf_trt.runtime.trajectory import Job

BFLOAT16 = "bfloat16"


class Device:
    """Engines on one GPU, shared by the sessions."""

    def __init__(
        self,
        gpu: Gpu,
        engines: Mapping[str, DeviceEngine],
        manifest: Manifest,
        constants: Mapping[str, Memory],
        stream: Stream,
        closing: ExitStack,
        *,
        library: str,
        one_stream: bool,
    ) -> None:
        """`closing` frees all that is given; `one_stream` when the engines run on `stream` only."""
        self.engines = engines
        self.description = f"{gpu.description}, {library}"
        self.max_sessions = 1 if one_stream else None
        self._gpu = gpu
        self._manifest = manifest
        self._constants = constants
        self._stream = stream
        self._closing = closing
        self._binding = Lock()

    @classmethod
    def open(
        cls, bundle: Bundle, ordinal: int, kind: EngineKind | None, *, graphs: Sequence[str] | None = None
    ) -> "Device":
        """Check that the bundle's engines fit, then load them, or some; a failure frees what was loaded.

        Raises MissingDependency, DeviceError and its kinds, EngineError, BundleError, PortMismatch.
        """
        gpu = Gpu.open(ordinal)
        manifest = bundle.manifest
        opened: dict[Library, TensorRT] = {}

        def version_of(library: Library) -> str:
            opened[library] = TensorRT(library)
            return opened[library].version

        library = library_for(manifest, gpu, kind, version_of)
        with ExitStack() as stack:
            stream = gpu.stream()
            stack.callback(stream.close)
            engines: dict[str, DeviceEngine] = {}
            files = {facts.graph: bundle.path / facts.file for facts in manifest.engines if facts.target == library}
            for graph in manifest.graphs:
                if graphs is not None and graph.name not in graphs:
                    continue
                engine: DeviceEngine
                if library is None:
                    engine = OnnxRuntimeCudaEngine(graph, bundle.graph_path(graph.name), gpu=gpu, stream=stream)
                else:
                    engine = opened[library].load(graph, files[graph.name], stream)
                stack.callback(engine.close)
                engines[graph.name] = engine
            constants = {}
            for name, array in bundle.constants().items():
                constants[name] = gpu.allocate(array.nbytes, stream)
                stack.callback(constants[name].close)
                upload(gpu, stream, constants[name], array)
            name = "ONNX Runtime" if library is None else f"{library} {opened[library].version}"
            return cls(
                gpu,
                engines,
                manifest,
                constants,
                stream,
                stack.pop_all(),
                library=name,
                one_stream=library is None,
            )

    def session(self, kept: int = KEPT_TRAJECTORIES) -> Session:
        """A session with a stream and scratch memory of its own, as much of it as any of the engines may need."""
        self._gpu.use()
        with ExitStack() as stack:
            stream = self._stream
            if self.max_sessions is None:
                stream = self._gpu.stream()
                stack.callback(stream.close)
            scratch = None
            scratch_bytes = max(engine.scratch_bytes for engine in self.engines.values())
            if scratch_bytes:
                scratch = self._gpu.allocate(scratch_bytes, stream)
                stack.callback(scratch.close)
            bind_call = partial(DeviceCall, self._gpu, stream, scratch, self.engines)
            return Session(partial(self._bind, stream, scratch), bind_call, stack.pop_all().close, kept=kept)

    def run(self, graph: Graph, arrays: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """One run of a graph, from the arrays of its inputs into those of its outputs; bfloat16 stands in float32."""
        self._gpu.use()
        stream, ports = self._stream, (*graph.inputs, *graph.outputs)
        given = {**arrays, **outputs}
        shapes = {port.name: given[port.name].shape for port in ports}
        with ExitStack() as stack:

            def memory(port: Port) -> Memory:
                made = self._gpu.allocate(prod(shapes[port.name]) * ITEM_BYTES[port.dtype], stream)
                stack.callback(made.close)
                return made

            places = {port.name: memory(port) for port in ports}
            for port in graph.inputs:
                upload(self._gpu, stream, places[port.name], _stored(arrays[port.name], port.dtype))
            engine = self.engines[graph.name]
            scratch = None
            if engine.scratch_bytes:
                scratch = self._gpu.allocate(engine.scratch_bytes, stream)
                stack.callback(scratch.close)
            context = engine.context({port.name: shapes[port.name] for port in graph.inputs}, stream, scratch)
            stack.callback(context.close)
            context.bind({name: place.address for name, place in places.items()}, shapes)()
            for port in graph.outputs:
                _download(self._gpu, stream, places[port.name], outputs[port.name], port.dtype)

    def close(self) -> None:
        with suppress(DeviceError), translated("the GPU could not be given back"):
            self._gpu.use()
            self._closing.close()

    def _bind(self, stream: Stream, scratch: Memory | None, job: Job) -> DeviceTrajectory:
        with self._binding:
            route = route_of(self._manifest, job)
            return DeviceTrajectory(self._gpu, self.engines, self._constants, route, stream, scratch)


def _download(gpu: Gpu, stream: Stream, source: Memory, array: Array, dtype: str) -> None:
    pinned = gpu.pinned(source.size_bytes)
    try:
        stream.copy(pinned, source)
        stream.sync()
        stored = pinned.host_bytes().view(np.uint16 if dtype == BFLOAT16 else dtype).reshape(array.shape)
        array[:] = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == BFLOAT16 else stored
    finally:
        pinned.close()


def _stored(array: Array, dtype: str) -> NDArray[Any]:
    """An array as the GPU keeps it: numpy has no bfloat16, so its upper 16 bits are rounded to nearest even."""
    if dtype != BFLOAT16:
        return array.astype(dtype, copy=False)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
