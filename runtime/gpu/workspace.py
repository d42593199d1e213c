"""What a session owns on a GPU: its stream, its scratch memory, and what is bound to them."""

from collections.abc import Mapping
from threading import Lock

from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.ports import Graph
from ilf_trt.runtime.route import Route, route_of
from ilf_trt.runtime.trajectory import Job

from .call import DeviceCall
from .cuda import Gpu, Memory, Stream
from .current import Allocated
from .engine import DeviceEngine
from .scratch import Scratch
from .trajectory import DeviceTrajectory


class Workspace(Allocated):
    """One stream and one scratch memory; whatever is bound here runs there, one after another."""

    def __init__(
        self,
        gpu: Gpu,
        engines: Mapping[str, DeviceEngine],
        constants: Mapping[str, Memory],
        binding: Lock,
        *,
        stream: Stream | None = None,
    ) -> None:
        """With `stream` it uses that one, which somebody else closes. `binding` lets one thread at a time bind."""
        self._gpu = gpu
        self._engines = engines
        self._constants = constants
        self._binding = binding
        self._owns_stream = stream is None
        self._stream = gpu.stream() if stream is None else stream
        self._scratch = Scratch(gpu, self._stream)

    def bind(self, manifest: Manifest, job: Job) -> DeviceTrajectory:
        """The trajectory of a job; raises what `bind_route` raises."""
        return self.bind_route(route_of(manifest, job))

    def bind_route(self, route: Route) -> DeviceTrajectory:
        """The trajectory of a route; raises OutOfMemory, EngineError, InvalidRequest."""
        with self._binding:
            return DeviceTrajectory(self._gpu, self._engines, self._constants, route, self._stream, self._scratch)

    def bind_call(self, graph: Graph, sizes: Mapping[str, int]) -> DeviceCall:
        """A single graph for the sizes of its symbols; raises OutOfMemory, EngineError, InvalidRequest."""
        with self._binding:
            return DeviceCall(self._gpu, self._stream, self._scratch, self._engines, graph, sizes)

    def _free(self) -> None:
        self._scratch.close()
        self._stream.sync()
        if self._owns_stream:
            self._stream.close()
