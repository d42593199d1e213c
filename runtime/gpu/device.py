"""A bundle on one GPU: one copy of its engines and constants, and sessions that run them on separate streams."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from threading import Lock

from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.ports import Graph
from ilf_trt.contract.target import Library
from ilf_trt.errors import DeviceError
from ilf_trt.runtime.engine import EngineKind
from ilf_trt.runtime.onnx_file import OnnxFile
from ilf_trt.runtime.route import route_of
from ilf_trt.runtime.session import KEPT_TRAJECTORIES, Session
from ilf_trt.runtime.trajectory import Job

from .call import DeviceCall
from .compatibility import library_for
from .cuda import Gpu, Memory, Stream, upload
from .engine import DeviceEngine
from .errors import translate_errors
from .onnxruntime_cuda import OnnxRuntimeCudaEngine
from .tensorrt import TensorRT
from .trajectory import DeviceTrajectory


class Device:
    """Engines on one GPU; all sessions share them."""

    on_gpu = True

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
        """`closing` frees all the other arguments. `one_stream` says that the engines run only on `stream`."""
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
        """Check that the bundle's engines fit this machine, then load all, or those of `graphs`.

        A failure frees everything. Raises MissingDependency, DeviceError and its subclasses, EngineError, BundleError,
        PortMismatch.
        """
        gpu = Gpu.open(ordinal)
        manifest = bundle.manifest
        runtimes: dict[Library, TensorRT] = {}

        def version_of(library: Library) -> str:
            runtimes[library] = TensorRT(library)
            return runtimes[library].version

        library = library_for(manifest, gpu, kind, version_of)
        with ExitStack() as stack:
            stream = gpu.stream()
            stack.callback(stream.close)
            engines: dict[str, DeviceEngine] = {}
            files = {facts.graph: facts.file for facts in manifest.engines if facts.target == library}
            for graph in manifest.graphs:
                if graphs is not None and graph.name not in graphs:
                    continue
                engine: DeviceEngine
                if library is None:
                    file = OnnxFile.of_bundle(bundle, graph)
                    engine = OnnxRuntimeCudaEngine(graph, file, gpu=gpu, stream=stream)
                else:
                    engine = runtimes[library].load(graph, bundle.file(files[graph.name]), stream)
                stack.callback(engine.close)
                engines[graph.name] = engine
            constants = {}
            for name, array in bundle.constants().items():
                constants[name] = gpu.allocate(array.nbytes, stream)
                stack.callback(constants[name].close)
                upload(gpu, stream, constants[name], array)
            name = "ONNX Runtime" if library is None else f"{library} {runtimes[library].version}"
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

    def session(self, max_trajectories: int = KEPT_TRAJECTORIES) -> Session:
        """A new session; the last `max_trajectories` trajectories stay bound.

        The session has its own stream and its own scratch memory, as large as the neediest engine requires.
        """
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
            return Session(
                partial(self._bind, stream, scratch),
                partial(self._bind_call, stream, scratch),
                stack.pop_all().close,
                max_trajectories=max_trajectories,
            )

    def close(self) -> None:
        """Free engines and constants; the sessions must be closed."""
        with suppress(DeviceError), translate_errors("the GPU could not be freed"):
            self._gpu.use()
            self._closing.close()

    def _bind(self, stream: Stream, scratch: Memory | None, job: Job) -> DeviceTrajectory:
        self._gpu.use()
        with self._binding:
            route = route_of(self._manifest, job)
            return DeviceTrajectory(self._gpu, self.engines, self._constants, route, stream, scratch)

    def _bind_call(self, stream: Stream, scratch: Memory | None, graph: Graph, sizes: Mapping[str, int]) -> DeviceCall:
        self._gpu.use()
        with self._binding:
            return DeviceCall(self._gpu, stream, scratch, self.engines, graph, sizes)
