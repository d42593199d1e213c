"""CUDA through cuda.core: one GPU, its memory, streams, events and graphs.

Tests without a GPU cannot prove what cuda.core and the driver do, so only this file and `array.py` call them,
and `contract/driver.py` for the version of the driver.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.driver import check_driver, cuda_of_driver, driver_version
from ilf_trt.contract.target import Architecture
from ilf_trt.errors import DeviceError, MissingDependency, one_line

from .collection import no_collection
from .current import OnGpu
from .errors import device_error, translate_errors

ALIGNMENT = 256  # bytes, of every address that an engine reads or writes


class Gpu(OnGpu):
    """One GPU, which several threads may share."""

    def __init__(self, device: Any, ordinal: int, driver: tuple[int, ...]) -> None:
        self._gpu = self
        self._device = device
        self.ordinal = ordinal
        self.name = str(device.name)
        capability = device.compute_capability
        self.architecture = Architecture(int(capability.major), int(capability.minor))
        self.driver = driver
        self._bindings = import_module("cuda.bindings.driver")
        self._context: int | None = None

    @classmethod
    def open(cls, ordinal: int) -> Self:
        """The GPU `cuda:ordinal`, current on this thread; raises as `found` does."""
        gpu = cls.found(ordinal)
        gpu.use()
        return gpu

    @classmethod
    def found(cls, ordinal: int) -> Self:
        """The GPU `cuda:ordinal`; what is current on this thread stays.

        Raises MissingDependency without cuda-core. Raises DeviceError without a driver, without such a GPU, and if
        another process holds the GPU in exclusive mode.
        """
        try:
            core, system = import_module("cuda.core"), import_module("cuda.core.system")
        except ImportError as error:
            raise MissingDependency(
                f"device 'cuda:{ordinal}' needs cuda-core and cuda-bindings ({one_line(error)}); pip install "
                "'ilf-trt[cuda]'"
            ) from error
        with translate_errors(f"device 'cuda:{ordinal}' cannot be used", "check nvidia-smi, or pass device='cpu'"):
            driver = driver_version(system)
            check_driver(f"device 'cuda:{ordinal}' cannot be used", driver, cuda_of_driver())
            count = len(core.Device.get_all_devices())
            if ordinal >= count:
                raise DeviceError(
                    f"device 'cuda:{ordinal}' does not exist, this machine has {count} GPU{'s' * (count != 1)}; "
                    + (f"pass cuda:0 to cuda:{count - 1}" if count else "check nvidia-smi, or pass device='cpu'")
                )
            gpu = cls(core.Device(ordinal), ordinal, driver)
            with gpu.current():  # a GPU that another process holds is refused here
                return gpu

    @property
    def description(self) -> str:
        """Name, architecture and driver."""
        return f"{self.name}, {self.architecture}, driver {'.'.join(map(str, self.driver)) or 'unknown'}"

    def use(self) -> None:
        """Make the GPU current on the calling thread, for good."""
        with translate_errors(f"cuda:{self.ordinal} cannot be used"):
            self._device.set_current()

    @contextmanager
    def current(self) -> Iterator[None]:
        """The GPU is current on the calling thread within the block; what was before is again after it.

        A thread that had none has none again: a GPU that stayed would become the one that other libraries take there.
        """
        try:
            before = self._current_context()
            there = int(before) == self._context
            if not there:
                self._device.set_current()
                if self._context is None:
                    self._context = int(self._current_context())
        except Exception as error:
            raise device_error(f"cuda:{self.ordinal} cannot be used", error) from error
        try:
            yield
        finally:
            if not there:
                self._bindings.cuCtxSetCurrent(before)  # can fail only where that context was destroyed meanwhile

    def stream(self) -> "Stream":
        """A new stream that waits for no other stream."""
        with translate_errors("no stream could be created"):
            return Stream(self._device.create_stream())

    def allocate(self, size_bytes: int, stream: "Stream") -> "Memory":
        """GPU memory for use on `stream`, 256-byte aligned, with undefined content; raises OutOfMemory."""
        with translate_errors(f"{size_bytes / (1 << 20):.0f} MiB of GPU memory could not be allocated"):
            return Memory(self._device.allocate(max(size_bytes, 1), stream=stream.core))

    def pinned(self, size_bytes: int) -> "Memory":
        """Zeros in host memory that the GPU copies from and to while the host goes on; raises OutOfMemory."""
        with translate_errors(f"{size_bytes / (1 << 20):.0f} MiB of pinned host memory could not be allocated"):
            memory = Memory(import_module("cuda.core").LegacyPinnedMemoryResource().allocate(max(size_bytes, 1)))
        memory.host_bytes().fill(0)
        return memory

    def trim(self) -> None:
        """Give memory that is free, and that CUDA keeps for later allocations of this process, back to the GPU."""
        with translate_errors("free memory could not be given back"):
            (result,) = self._bindings.cuMemPoolTrimTo(self._device.memory_resource.handle, 0)
            if result:
                raise DeviceError(f"free memory could not be given back: {result.name}")

    def used_bytes(self) -> int:
        """Memory of the whole GPU that any process uses, in bytes."""
        with translate_errors("the memory of the GPU is not known"):
            result, free, total = self._bindings.cuMemGetInfo()
            if result:
                raise DeviceError(f"the memory of the GPU is not known: {result.name}")
            return int(total - free)

    def event(self) -> Any:
        """An event that records a time: `last - first` is in ms, after the GPU has passed both."""
        with translate_errors("no event could be created"):
            return self._device.create_event(options=import_module("cuda.core").EventOptions(timing_enabled=True))

    def _current_context(self) -> Any:
        """What is current on the calling thread: an object whose int is 0 for none."""
        result, context = self._bindings.cuCtxGetCurrent()
        if result:
            raise RuntimeError(result.name)
        return context


class Memory:
    """An allocation, or a part of an allocation."""

    __slots__ = ("address", "core", "size_bytes")

    def __init__(self, core: Any) -> None:
        self.core = core
        self.address = int(core.handle)
        self.size_bytes = int(core.size)

    def part(self, offset: int, size_bytes: int) -> "Memory":
        """Some bytes of this memory; this memory must stay open."""
        buffer = import_module("cuda.core").Buffer
        return Memory(buffer.from_handle(self.address + offset, size_bytes, owner=self.core))

    def host_bytes(self) -> NDArray[np.uint8]:
        """The bytes of pinned memory as an array on the host; valid until `close`."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.size_bytes).from_address(self.address))

    def close(self, after: Sequence["Stream"] = ()) -> None:
        """Free the memory after the work that is now on the streams of `after`, by default on its own stream."""
        if not after:
            self.core.close()
            return
        *others, last = after
        with translate_errors("memory could not be freed"):
            for other in others:
                last.core.wait(other.core)
            self.core.close(last.core)


class Stream:
    """Work for the GPU, in order. Only `sync` waits."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.handle = int(core.handle)

    @classmethod
    def of_handle(cls, handle: int) -> Self:
        """Another library's stream, which must live as long as this one is used."""
        return cls(import_module("cuda.core").Stream.from_handle(handle))

    def copy(self, target: Memory, source: Memory) -> None:
        """Copy memory to memory of the same size; each is on the GPU or in pinned memory of the host."""
        with translate_errors("a copy failed"):
            target.core.copy_from(source.core, stream=self.core)

    def zero(self, target: Memory) -> None:
        """Fill the memory with zeros."""
        with translate_errors("memory could not be cleared"):
            target.core.fill(0, stream=self.core)

    def record(self, event: Any) -> None:
        """Put an event behind the work that is on the stream now."""
        with translate_errors("an event could not be recorded"):
            self.core.record(event)

    def sync(self) -> None:
        """Wait until all work is done; raises the errors of that work."""
        with translate_errors("the GPU failed"):
            self.core.sync()

    def capture(self, enqueue: Callable[[], None]) -> "CapturedGraph":
        """The work that `enqueue` puts on this stream, as one graph; it does not run, and other threads go on.

        Raises what `enqueue` raises, and DeviceError if CUDA cannot capture the work. The stream stays usable.
        """
        with translate_errors("the trajectory could not be captured"), no_collection():
            builder = self.core.create_graph_builder()
            try:
                builder.begin_building("thread_local")
                enqueue()
                builder.end_building()
                graph = builder.complete()
            except BaseException:
                with suppress(Exception):  # `close` ends an open capture, and raises because the capture is invalid
                    builder.close()
                raise
            builder.close()
            graph.upload(self.core)
            return CapturedGraph(graph, self)

    def close(self) -> None:
        """Free the stream."""
        self.core.close()


class CapturedGraph:
    """Work of a stream as one CUDA graph."""

    def __init__(self, core: Any, stream: Stream) -> None:
        self._core = core
        self._stream = stream

    def launch(self) -> None:
        """Put the whole graph on its stream."""
        with translate_errors("a captured trajectory could not be launched"):
            self._core.launch(self._stream.core)

    def close(self) -> None:
        """Free the graph."""
        self._core.close()


def upload(gpu: Gpu, stream: Stream, target: Memory, array: NDArray[Any]) -> None:
    """Copy an array to `target`, memory of the same size on the GPU; return when the copy is complete."""
    pinned = gpu.pinned(array.nbytes)
    try:
        pinned.host_bytes()[: array.nbytes] = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        stream.copy(target, pinned.part(0, target.size_bytes))
        stream.sync()
    finally:
        pinned.close()
