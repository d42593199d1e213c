"""CUDA as the runtime uses it: one GPU, its memory, streams, events and graphs, through cuda.core.

What cuda.core and the driver really do cannot be proved without a GPU, so everything that touches them stands here.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.target import Architecture
from ilf_trt.errors import DeviceError, MissingDependency
from ilf_trt.runtime.gpu.errors import line_of, translated

ALIGNMENT = 256  # of every address that an engine is given


class Gpu:
    """One GPU. Threads may share it; each calls `use` before anything else."""

    def __init__(self, device: Any, ordinal: int, driver: tuple[int, ...]) -> None:
        self._device = device
        self.ordinal = ordinal
        self.name = str(device.name)
        capability = device.compute_capability
        self.architecture = Architecture(int(capability.major), int(capability.minor))
        self.driver = driver

    @classmethod
    def open(cls, ordinal: int) -> Self:
        """The GPU `cuda:ordinal`, current on this thread.

        Raises MissingDependency without cuda-core, DeviceError when there is no driver, no such GPU, or another process
        holds it alone.
        """
        try:
            core, system = import_module("cuda.core"), import_module("cuda.core.system")
        except ImportError as error:
            raise MissingDependency(
                f"device 'cuda:{ordinal}' needs cuda-core and cuda-bindings ({line_of(error)}); pip install "
                "'ilf-trt[cuda]'"
            ) from error
        with translated(f"device 'cuda:{ordinal}' cannot be used", "check nvidia-smi, or pass device='cpu'"):
            count = len(core.Device.get_all_devices())
            if ordinal >= count:
                raise DeviceError(
                    f"device 'cuda:{ordinal}' does not exist, this machine shows {count} GPU{'s' * (count != 1)}; "
                    + (f"pass cuda:0 to cuda:{count - 1}" if count else "check nvidia-smi, or pass device='cpu'")
                )
            device = core.Device(ordinal)
            device.set_current()
            return cls(device, ordinal, _driver(system))

    @property
    def description(self) -> str:
        return f"{self.name}, {self.architecture}, driver {'.'.join(map(str, self.driver)) or 'unknown'}"

    def use(self) -> None:
        """Make the GPU current on the calling thread."""
        with translated("the GPU cannot be used"):
            self._device.set_current()

    def stream(self) -> "Stream":
        """A new stream that waits for no other."""
        with translated("no stream could be made"):
            return Stream(self._device.create_stream())

    def allocate(self, size_bytes: int, stream: "Stream") -> "Memory":
        """Memory of the GPU for use on `stream`, 256-byte aligned, its content undefined; raises OutOfMemory."""
        with translated(f"{size_bytes / (1 << 20):.0f} MiB of GPU memory could not be had"):
            return Memory(self._device.allocate(max(size_bytes, 1), stream=stream.core))

    def pinned(self, size_bytes: int) -> "Memory":
        """Memory of the host that the GPU copies from and to without waiting; zero."""
        with translated(f"{size_bytes / (1 << 20):.0f} MiB of pinned host memory could not be had"):
            memory = Memory(import_module("cuda.core").LegacyPinnedMemoryResource().allocate(max(size_bytes, 1)))
        memory.host_bytes().fill(0)
        return memory

    def event(self) -> Any:
        """An event whose distance to another is a time: `last - first` in ms, once both are done."""
        with translated("no event could be made"):
            return self._device.create_event(options=import_module("cuda.core").EventOptions(timing_enabled=True))


class Memory:
    """An allocation, or a part of one."""

    __slots__ = ("address", "core", "size_bytes")

    def __init__(self, core: Any) -> None:
        self.core = core
        self.address = int(core.handle)
        self.size_bytes = int(core.size)

    def part(self, offset: int, size_bytes: int) -> "Memory":
        """Some bytes of it; the whole must stay open."""
        buffer = import_module("cuda.core").Buffer
        return Memory(buffer.from_handle(self.address + offset, size_bytes, owner=self.core))

    def host_bytes(self) -> NDArray[np.uint8]:
        """Pinned memory as the host sees it; valid until `close`."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.size_bytes).from_address(self.address))

    def close(self) -> None:
        self.core.close()


class Stream:
    """Work for the GPU, in order; nothing here waits but `sync`."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.handle = int(core.handle)

    def copy(self, target: Memory, source: Memory) -> None:
        """Both of one size; between the host's pinned memory and the GPU's, or within either."""
        with translated("a copy failed"):
            target.core.copy_from(source.core, stream=self.core)

    def zero(self, target: Memory) -> None:
        with translated("memory could not be cleared"):
            target.core.fill(0, stream=self.core)

    def record(self, event: Any) -> None:
        with translated("an event could not be recorded"):
            self.core.record(event)

    def sync(self) -> None:
        """Wait until all of it is done; what the work itself did wrong is raised here."""
        with translated("the GPU failed"):
            self.core.sync()

    def capture(self, enqueue: Callable[[], None]) -> "CapturedGraph":
        """What `enqueue` puts on this stream as one graph, without running it; other threads go on undisturbed.

        Raises what `enqueue` raises, and DeviceError when CUDA cannot capture it; the stream is usable afterwards.
        """
        with translated("the trajectory could not be captured"):
            builder = self.core.create_graph_builder()
            try:
                builder.begin_building("thread_local")
                enqueue()
                builder.end_building()
                graph = builder.complete()
            except BaseException:
                with suppress(Exception):  # it ends a capture that is still open, and says that it was invalid
                    builder.close()
                raise
            builder.close()
            graph.upload(self.core)
            return CapturedGraph(graph, self)

    def close(self) -> None:
        self.core.close()


class CapturedGraph:
    """Work that was captured from a stream and is launched there as one."""

    def __init__(self, core: Any, stream: Stream) -> None:
        self._core = core
        self._stream = stream

    def launch(self) -> None:
        with translated("a captured trajectory could not be launched"):
            self._core.launch(self._stream.core)

    def close(self) -> None:
        self._core.close()


def upload(gpu: Gpu, stream: Stream, target: Memory, array: NDArray[Any]) -> None:
    """Bring an array to the GPU and wait until it is there; `target` has its size."""
    pinned = gpu.pinned(array.nbytes)
    try:
        pinned.host_bytes()[: array.nbytes] = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        stream.copy(target, pinned.part(0, target.size_bytes))
        stream.sync()
    finally:
        pinned.close()


def _driver(system: Any) -> tuple[int, ...]:
    try:
        return tuple(system.get_kernel_mode_driver_version())
    except RuntimeError:  # a container that was given a GPU, but not NVML
        return ()
