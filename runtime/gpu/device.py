"""A bundle on one GPU: one copy of its engines and constants, and sessions that run them on separate streams."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from threading import Lock

from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.target import Library
from ilf_trt.runtime.engine import EngineKind
from ilf_trt.runtime.onnx_file import OnnxFile
from ilf_trt.runtime.onnxruntime_import import onnxruntime_version
from ilf_trt.runtime.session import KEPT_TRAJECTORIES, Session

from .compatibility import library_for
from .cuda import Gpu, Memory, Stream, upload
from .current import Allocated
from .engine import DeviceEngine
from .onnxruntime_cuda import OnnxRuntimeCudaEngine
from .tensorrt import TensorRT
from .workspace import Workspace


class Device(Allocated):
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
        """`closing` frees `engines` and `constants`. `one_stream` says that the engines run only on `stream`."""
        self.engines = engines
        self.device_name, self.library = gpu.description, library
        self.description = f"{gpu.description}, {'ONNX Runtime' if one_stream else library}"
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
        gpu = Gpu.found(ordinal)
        with gpu.current():
            return cls._opened(gpu, bundle, kind, graphs)

    @classmethod
    def _opened(cls, gpu: Gpu, bundle: Bundle, kind: EngineKind | None, graphs: Sequence[str] | None) -> "Device":
        manifest = bundle.manifest
        runtimes: dict[Library, TensorRT] = {}

        def version_of(library: Library) -> str:
            runtimes[library] = TensorRT(library)
            return runtimes[library].version

        library = library_for(manifest, gpu, kind, version_of)
        stream = gpu.stream()
        with ExitStack() as failure, ExitStack() as stack:
            failure.callback(stream.close)
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
            name = onnxruntime_version() if library is None else f"{library} {runtimes[library].version}"
            failure.pop_all()
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
        """A new session with a stream and scratch memory of its own; the last `max_trajectories` stay bound."""
        stream = None if self.max_sessions is None else self._stream
        space = Workspace(self._gpu, self.engines, self._constants, self._binding, stream=stream)
        return Session(
            partial(space.bind, self._manifest), space.bind_call, space.close, max_trajectories=max_trajectories
        )

    def _free(self) -> None:
        """Free engines and constants; the sessions must be closed."""
        self._closing.close()
        self._stream.sync()
        self._stream.close()
        self._gpu.trim()
