"""The names of cuda.core 1.2 that a runtime uses, on top of `fake_gpu`; `install` puts them in the real ones' place."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, cast

import fake_dlpack
import numpy as np
import pytest
from fake_dlpack import CPU, CUDA, CUDA_HOST, Layout, dense
from fake_errors import STICKY, CUDAError, RuleBroken, cuda_error
from fake_gpu import (
    LEGACY,
    NULL_STREAM,
    PER_THREAD,
    Capture,
    Counts,
    EventState,
    FakeCuda,
    FakeGpu,
    GraphState,
    Op,
    StreamState,
)
from fake_memory import ALIGNMENT, UNWRITTEN, Allocation, Span

__all__ = [
    "ALIGNMENT",
    "STICKY",
    "UNWRITTEN",
    "CUDAError",
    "Counts",
    "FakeCuda",
    "FakeGpu",
    "Op",
    "RuleBroken",
    "Span",
    "cuda_error",
    "install",
]

CUDA_VERSION, OLDER_CUDA_VERSION = (13, 0), (12, 2)
POOL = 0x9001_0000
NO_CONTEXT, CONTEXT = 0, 0xC700_0000
NO_DRIVER = (
    '"{}" is an NVIDIA driver library and can only be found via system search. Ensure the NVIDIA display driver is '
    "installed."
)
_installed: FakeCuda | None = None


def install(
    monkeypatch: pytest.MonkeyPatch,
    *,
    devices: Sequence[FakeGpu] = (FakeGpu(),),
    driver: tuple[int, ...] | None = (580, 65, 6),
    nvml: bool = True,
) -> FakeCuda:
    """A machine with these GPUs; without a driver it is one that never had any, without NVML a container."""
    cuda = FakeCuda(devices, driver, nvml=nvml)
    monkeypatch.setattr(sys.modules[__name__], "_installed", cuda)
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return cuda


def modules() -> dict[str, ModuleType]:
    """The fake modules by name, each an attribute of the one that it belongs to."""
    contents: dict[str, Sequence[Any]] = {
        "cuda": (),
        "cuda.core": (
            Device,
            Stream,
            StreamOptions,
            Event,
            EventOptions,
            Buffer,
            MemoryResource,
            DeviceMemoryResource,
            LegacyPinnedMemoryResource,
            PinnedMemoryResource,
        ),
        "cuda.core.graph": (GraphBuilder, Graph, GraphCompleteOptions),
        "cuda.core.utils": (StridedMemoryView,),
        "cuda.core.system": (get_kernel_mode_driver_version, get_user_mode_driver_version, get_num_devices),
        "cuda.bindings": (),
        "cuda.bindings.driver": (
            cuCtxGetCurrent,
            cuCtxSetCurrent,
            cuDriverGetVersion,
            cuMemGetInfo,
            cuMemPoolTrimTo,
        ),
        "cuda.core._utils": (),
        "cuda.core._utils.cuda_utils": (CUDAError, ComputeCapability),
    }
    made: dict[str, ModuleType] = {}
    for name, things in contents.items():
        module = made[name] = ModuleType(name)
        module.__path__ = []
        for thing in things:
            setattr(module, thing.__name__, thing)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(made[parent], last, module)
    core = cast(Any, made["cuda.core"])
    core.__version__ = "1.2.2"
    core.LEGACY_DEFAULT_STREAM = Stream._of_handle(LEGACY)
    core.PER_THREAD_DEFAULT_STREAM = Stream._of_handle(PER_THREAD)
    return made


class DynamicLibNotFoundError(RuntimeError):
    """What cuda.pathfinder raises on a machine without a driver."""


class ComputeCapability(NamedTuple):
    major: int
    minor: int


@dataclass
class EventOptions:
    timing_enabled: bool | None = False
    blocking_sync: bool | None = False
    ipc_enabled: bool | None = False


@dataclass
class StreamOptions:
    nonblocking: Any = True
    priority: int | None = None


@dataclass
class GraphCompleteOptions:
    auto_free_on_launch: bool = False
    upload_stream: "Stream | None" = None
    device_launch: bool = False
    use_node_priority: bool = False


def get_kernel_mode_driver_version() -> tuple[int, ...]:
    return _nvml().driver or ()


def get_user_mode_driver_version() -> tuple[int, ...]:
    _nvml()
    return CUDA_VERSION


def get_num_devices() -> int:
    return len(_nvml().devices)


def cuDriverGetVersion() -> tuple[int, int]:  # noqa: N802
    """Of cuda.bindings, which asks the driver itself: an error code and 13000 for CUDA 13.0."""
    driver = _gpu().driver
    if driver is None:
        raise DynamicLibNotFoundError(NO_DRIVER.format("cuda"))
    major, minor = CUDA_VERSION if not driver or driver >= (580,) else OLDER_CUDA_VERSION
    return 0, major * 1000 + minor * 10


def cuCtxGetCurrent() -> "tuple[int, Handle]":  # noqa: N802
    """Of cuda.bindings: an error code, and the context that is current on this thread, 0 for none."""
    cuda = _started()
    cuda.journal.append(("get_context",))
    return 0, Handle(NO_CONTEXT if cuda.current is None else CONTEXT + cuda.current)


def cuCtxSetCurrent(ctx: "Handle") -> tuple[int]:  # noqa: N802
    """Of cuda.bindings; each GPU has one context."""
    context = int(ctx)
    _started().set_context(None if context == NO_CONTEXT else context - CONTEXT)
    return (0,)


def cuMemGetInfo() -> tuple[int, int, int]:  # noqa: N802
    """Of cuda.bindings: an error code, and free and total bytes of the GPU that is current."""
    cuda = _gpu()
    if cuda.current is None:
        cuda.break_rule("memory was asked for on a thread where no GPU is current")
    total = cuda.devices[cuda.current or 0].memory_bytes
    return 0, total - cuda.reserved_bytes(cuda.current or 0), total


def cuMemPoolTrimTo(pool: "Handle", minBytesToKeep: int) -> tuple[int]:  # noqa: N802, N803
    """Of cuda.bindings; the pool of a GPU is the handle of its memory resource."""
    cuda = _gpu()
    if minBytesToKeep:
        raise NotImplementedError("the fake gives everything back, or nothing")
    cuda.trim(int(pool) - POOL)
    return (0,)


class Device:
    """One GPU, as seen by one thread."""

    def __new__(cls, device_id: "Device | int | None" = None) -> "Device":
        cuda = _started()
        if isinstance(device_id, Device):
            return device_id
        ordinal = (cuda.current or 0) if device_id is None else device_id
        if ordinal < 0:
            raise ValueError(f"device_id must be >= 0, got {ordinal}")
        if ordinal >= len(cuda.devices):
            raise ValueError(f"device_id must be within [0, {len(cuda.devices)}), got {ordinal}")
        self = object.__new__(cls)
        self._cuda, self._ordinal, self._gpu = cuda, ordinal, cuda.devices[ordinal]
        return self

    _cuda: FakeCuda
    _ordinal: int
    _gpu: FakeGpu

    @classmethod
    def get_all_devices(cls) -> "tuple[Device, ...]":
        return tuple(cls(ordinal) for ordinal in range(len(_started().devices)))

    @property
    def device_id(self) -> int:
        return self._ordinal

    @property
    def name(self) -> str:
        return self._gpu.name

    @property
    def compute_capability(self) -> ComputeCapability:
        return ComputeCapability(*self._gpu.capability)

    @property
    def arch(self) -> str:
        return "".join(map(str, self._gpu.capability))

    @property
    def default_stream(self) -> "Stream":
        return Stream._of_handle(LEGACY)

    @property
    def memory_resource(self) -> "DeviceMemoryResource":
        return DeviceMemoryResource(self._ordinal)

    def set_current(self, ctx: None = None) -> None:
        self._cuda.make_current(self._ordinal)

    def create_stream(self, obj: Any = None, options: "StreamOptions | dict[str, Any] | None" = None) -> "Stream":
        if obj is not None and options is not None:
            raise ValueError("obj and options cannot be both specified")
        if obj is not None:
            return Stream._of_handle(obj.__cuda_stream__()[1])
        self._check_started()
        _options(StreamOptions, options, "Stream options")
        return Stream._of_state(self._cuda, self._cuda.make_stream(self._ordinal), owned=True)

    def create_event(self, options: "EventOptions | dict[str, Any] | None" = None) -> "Event":
        self._check_started()
        chosen = _options(EventOptions, options, "Event options")
        return Event._of(self._cuda, self._cuda.make_event(self._ordinal, timing=bool(chosen.timing_enabled)))

    def create_graph_builder(self) -> "GraphBuilder":
        self._check_started()
        return self.create_stream().create_graph_builder()

    def allocate(self, size: int, *, stream: "Stream | GraphBuilder") -> "Buffer":
        self._check_started()
        return self.memory_resource.allocate(size, stream=stream)

    def sync(self) -> None:
        self._check_started()
        self._cuda.sync_device(self._ordinal)

    def _check_started(self) -> None:
        if self._cuda.current is None:
            self._cuda.break_rule(
                f"Device {self._ordinal} is not yet initialized, perhaps you forgot to call .set_current() first?"
            )

    def __int__(self) -> int:
        return self._ordinal

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other._ordinal == self._ordinal

    def __hash__(self) -> int:
        return hash(self._ordinal)

    def __repr__(self) -> str:
        return f"<Device {self._ordinal} ({self.name})>"


class Handle:
    """A pointer of CUDA as cuda.bindings hands it out: an object that has an int."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __int__(self) -> int:
        return self._value

    __index__ = __int__


class Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "Stream objects cannot be instantiated directly. Please use Device APIs (create_stream) or other Stream "
            "APIs (from_handle)."
        )

    _cuda: FakeCuda | None
    _state: StreamState | None
    _number: int
    _owned: bool

    @classmethod
    def _of_state(cls, cuda: FakeCuda, state: StreamState, *, owned: bool) -> "Stream":
        self = object.__new__(cls)
        self._cuda, self._state, self._number, self._owned = cuda, state, state.handle, owned
        return self

    @classmethod
    def _of_handle(cls, handle: int) -> "Stream":
        self = object.__new__(cls)
        self._cuda, self._state, self._number, self._owned = None, None, handle, False
        return self

    @staticmethod
    def from_handle(handle: int) -> "Stream":
        return Stream._of_handle(int(handle))

    @property
    def handle(self) -> Handle:
        return Handle(self._number)

    @property
    def is_closed(self) -> bool:
        return self._number == NULL_STREAM

    @property
    def device(self) -> Device:
        return Device(_state(self)[1].device)

    def close(self) -> None:
        if self._owned and self._cuda is not None and self._state is not None:
            self._cuda.close_stream(self._state)
        self._number = NULL_STREAM

    def sync(self) -> None:
        cuda, state = _state(self)
        cuda.sync_stream(state)

    def record(self, event: "Event | None" = None, options: "EventOptions | dict[str, Any] | None" = None) -> "Event":
        cuda, state = _state(self)
        if event is None:
            chosen = _options(EventOptions, options, "Event options")
            event = Event._of(cuda, cuda.make_event(state.device, timing=bool(chosen.timing_enabled)))
        cuda.record(event._checked(), state)
        return event

    def wait(self, event_or_stream: "Event | Stream") -> None:
        cuda, state = _state(self)
        if isinstance(event_or_stream, Event):
            cuda.wait(state, event_or_stream._checked())
            return
        if not hasattr(event_or_stream, "__cuda_stream__"):
            raise ValueError(
                "only an Event, Stream, or object supporting __cuda_stream__ can be waited, got "
                f"{type(event_or_stream)}"
            )
        between = EventState(state.device, timing=False)
        cuda.record(between, cuda.stream(event_or_stream.__cuda_stream__()[1]))
        cuda.wait(state, between)

    def create_graph_builder(self) -> "GraphBuilder":
        cuda, state = _state(self)
        return GraphBuilder._of(cuda, state, self)

    def __cuda_stream__(self) -> tuple[int, int]:
        if self.is_closed:
            _gpu().break_rule("a closed stream was used")
        return 0, self._number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __repr__(self) -> str:
        return f"<Stream handle={self._number:#x}>"


class Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Event objects cannot be instantiated directly. Please use Stream APIs (record).")

    _cuda: FakeCuda
    _state: EventState

    @classmethod
    def _of(cls, cuda: FakeCuda, state: EventState) -> "Event":
        self = object.__new__(cls)
        self._cuda, self._state = cuda, state
        return self

    @property
    def is_closed(self) -> bool:
        return self._state.closed

    @property
    def is_timing_enabled(self) -> bool:
        return self._state.timing

    @property
    def is_done(self) -> bool:
        return self._cuda.query_event(self._checked())

    @property
    def device(self) -> Device:
        return Device(self._state.device)

    def sync(self) -> None:
        self._cuda.sync_event(self._checked())

    def close(self) -> None:
        self._cuda.close_event(self._state)

    def __sub__(self, other: "Event") -> float:
        return self._cuda.elapsed_ms(other._checked(), self._checked())

    def _checked(self) -> EventState:
        if self._state.closed:
            self._cuda.break_rule("a closed event was used")
        return self._state


class MemoryResource:
    """Where buffers come from."""

    def allocate(self, size: int, *, stream: "Stream | GraphBuilder") -> "Buffer":
        raise TypeError("MemoryResource.allocate must be implemented by subclasses.")

    @property
    def is_device_accessible(self) -> bool:
        return True

    @property
    def is_host_accessible(self) -> bool:
        return False

    @property
    def device_id(self) -> int:
        raise TypeError("MemoryResource.device_id must be implemented by subclasses.")


class DeviceMemoryResource(MemoryResource):
    def __init__(self, device_id: "Device | int", options: Any = None) -> None:
        self._ordinal = int(device_id)

    def allocate(self, size: int, *, stream: "Stream | GraphBuilder") -> "Buffer":
        cuda, state = _state(stream)
        if size == 0:
            raise cuda_error("CUDA_ERROR_INVALID_VALUE")
        return Buffer._of(cuda, self, cuda.allocate("buffer", size, self._ordinal, state), state)

    @property
    def handle(self) -> "Handle":
        return Handle(POOL + self._ordinal)

    @property
    def device_id(self) -> int:
        return self._ordinal


class LegacyPinnedMemoryResource(MemoryResource):
    def allocate(self, size: int, *, stream: "Stream | GraphBuilder | None" = None) -> "Buffer":
        if stream is not None:
            _state(stream)
        cuda = _gpu()
        if cuda.current is None:
            cuda.break_rule("pinned memory was asked for on a thread where no GPU is current")
        return Buffer._of(cuda, self, cuda.allocate("pinned", size, cuda.current or 0, None), None)

    @property
    def is_host_accessible(self) -> bool:
        return True

    @property
    def device_id(self) -> int:
        raise RuntimeError("a pinned memory resource is not bound to any GPU")


class PinnedMemoryResource(MemoryResource):
    def __init__(self, options: Any = None) -> None:
        pass

    def allocate(self, size: int, *, stream: "Stream | GraphBuilder") -> "Buffer":
        cuda, state = _state(stream)
        return Buffer._of(cuda, self, cuda.allocate("pinned", size, state.device, state), state)

    @property
    def is_host_accessible(self) -> bool:
        return True

    @property
    def device_id(self) -> int:
        return -1


class Buffer:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Buffer objects cannot be instantiated directly. Please use MemoryResource APIs.")

    _cuda: FakeCuda
    _address: int
    _size: int
    _resource: MemoryResource | None
    _owner: object
    _allocation: Allocation | None
    _stream: StreamState | None
    _closed: bool

    @classmethod
    def _of(
        cls, cuda: FakeCuda, resource: MemoryResource, allocation: Allocation, stream: StreamState | None
    ) -> "Buffer":
        self = object.__new__(cls)
        self._cuda, self._address, self._size = cuda, allocation.address, allocation.size
        self._resource, self._owner, self._allocation = resource, None, allocation
        self._stream, self._closed = stream, False
        return self

    @staticmethod
    def from_handle(
        ptr: Any,
        size: int,
        mr: MemoryResource | None = None,
        owner: object = None,
        *,
        stream: "Stream | GraphBuilder | None" = None,
    ) -> "Buffer":
        if mr is not None and owner is not None:
            raise ValueError("owner and memory resource cannot be both specified together")
        if mr is not None:
            raise NotImplementedError("the fake frees no foreign memory")
        if stream is not None:
            raise ValueError("stream requires a memory resource (mr)")
        self = object.__new__(Buffer)
        self._cuda, self._address, self._size = _gpu(), int(ptr), int(size)
        self._resource, self._owner, self._allocation = None, owner, None
        self._stream, self._closed = None, False
        return self

    @property
    def handle(self) -> int:
        return 0 if self._closed else self._address

    @property
    def size(self) -> int:
        return 0 if self._closed else self._size

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def owner(self) -> object:
        return self._owner

    @property
    def memory_resource(self) -> MemoryResource | None:
        return self._resource

    @property
    def device_id(self) -> int:
        if self._resource is not None:
            return self._resource.device_id
        return self._span().allocation.device

    @property
    def is_device_accessible(self) -> bool:
        self._span()
        return True

    @property
    def is_host_accessible(self) -> bool:
        return self._span().allocation.kind == "pinned"

    def close(self, stream: "Stream | GraphBuilder | None" = None) -> None:
        if self._closed:
            return
        if self._allocation is not None:
            state = self._stream if stream is None else _state(stream)[1]
            self._cuda.free(self._allocation, state if self._stream is not None else None)
        self._closed = True

    def copy_to(self, dst: "Buffer | None" = None, *, stream: "Stream | GraphBuilder", options: Any = None) -> "Buffer":
        if dst is None:
            if self._resource is None:
                raise ValueError("a destination buffer must be provided (this buffer does not have a memory_resource)")
            dst = self._resource.allocate(self._size, stream=stream)
        dst.copy_from(self, stream=stream, options=options)
        return dst

    def copy_from(self, src: "Buffer", *, stream: "Stream | GraphBuilder", options: Any = None) -> None:
        cuda, state = _state(stream)
        self._check_open()
        src._check_open()
        if src.size != self.size:
            cuda.break_rule(f"buffer sizes mismatch between src and dst (sizes are: src={src.size}, dst={self.size})")
        cuda.copy((self._address, self._size), (src._address, src._size), state)

    def fill(self, value: Any, *, stream: "Stream | GraphBuilder") -> None:
        cuda, state = _state(stream)
        self._check_open()
        if isinstance(value, int):
            if not 0 <= value < 256:
                raise OverflowError("value too large to convert to uint8_t")
            pattern = bytes([value])
        else:
            pattern = bytes(memoryview(value).cast("B"))
        if len(pattern) not in (1, 2, 4):
            raise ValueError(f"value must be 1, 2, or 4 bytes, got {len(pattern)}")
        if self._size % len(pattern):
            raise ValueError(f"buffer size ({self._size}) must be divisible by {len(pattern)}")
        cuda.fill((self._address, self._size), pattern, state)

    def __enter__(self) -> "Buffer":
        return self

    def __exit__(self, exc_type: object, exc_val: object, exc_tb: object) -> None:
        self.close()

    def __dlpack_device__(self) -> tuple[int, int]:
        allocation = self._span().allocation
        return (CUDA_HOST, 0) if allocation.kind == "pinned" else (CUDA, allocation.device)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        layout = Layout(self._address, self.__dlpack_device__(), (self._size,), None, np.dtype(np.int8), False)
        return fake_dlpack.capsule_of(layout, self)

    def _check_open(self) -> None:
        if self._closed:
            self._cuda.break_rule("a closed buffer was used")

    def _span(self) -> Span:
        self._check_open()
        return self._cuda.span(self._address, self._size, "a buffer")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Buffer) and (other.handle, other.size) == (self.handle, self.size)

    def __hash__(self) -> int:
        return hash((self.handle, self.size))

    def __repr__(self) -> str:
        return f"<Buffer ptr={self.handle:#x} size={self.size}>"


class GraphBuilder:
    def __init__(self) -> None:
        raise NotImplementedError(
            "directly creating a GraphBuilder object can be ambiguous. Please either call "
            "Device.create_graph_builder() or stream.create_graph_builder()"
        )

    _cuda: FakeCuda
    _state: StreamState
    _stream: Stream
    _capture: Capture | None
    _ops: list[Op] | None
    _closed: bool

    @classmethod
    def _of(cls, cuda: FakeCuda, state: StreamState, stream: Stream) -> "GraphBuilder":
        self = object.__new__(cls)
        self._cuda, self._state, self._stream = cuda, state, stream
        self._capture, self._ops, self._closed = None, None, False
        cuda.opened(self, "graph builder")
        return self

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def stream(self) -> Stream:
        self._check_open()
        return self._stream

    @property
    def is_building(self) -> bool:
        self._check_open()
        if self._capture is None:
            return False
        if self._capture.invalid:
            raise RuntimeError(
                "Build process encountered an error and has been invalidated. Build process must now be ended."
            )
        return True

    def begin_building(self, mode: str | None = "relaxed") -> "GraphBuilder":
        self._check_open()
        if self._capture is not None:
            raise RuntimeError("Graph builder is already building.")
        if self._ops is not None:
            raise RuntimeError("Cannot resume building after building has ended.")
        if mode not in ("global", "thread_local", "relaxed"):
            raise ValueError(f"Unsupported build mode: {mode}")
        self._capture = self._cuda.begin_capture(self._state, mode)
        return self

    def end_building(self) -> "GraphBuilder":
        if not self.is_building:
            raise RuntimeError("Graph builder is not building.")
        self._ops = self._cuda.end_capture(cast(Capture, self._capture))
        self._capture = None
        return self

    def complete(self, options: GraphCompleteOptions | None = None) -> "Graph":
        self._check_open()
        if self._ops is None:
            raise RuntimeError("Graph has not finished building.")
        return Graph._of(self._cuda, self._cuda.make_graph(self._ops, self._state.device))

    def close(self) -> None:
        """Raises CUDAError, and stays open, when it ends a capture that is invalid, as cuda.core does."""
        self._cuda.shut(self)
        if self._capture is not None:
            self._cuda.end_capture(self._capture)
            self._capture = None
        self._closed = True

    def __cuda_stream__(self) -> tuple[int, int]:
        return self.stream.__cuda_stream__()

    def _check_open(self) -> None:
        if self._closed:
            self._cuda.break_rule("a closed graph builder was used")


class Graph:
    def __init__(self) -> None:
        raise RuntimeError("directly constructing a Graph instance is not supported")

    _cuda: FakeCuda
    _state: GraphState

    @classmethod
    def _of(cls, cuda: FakeCuda, state: GraphState) -> "Graph":
        self = object.__new__(cls)
        self._cuda, self._state = cuda, state
        return self

    @property
    def is_closed(self) -> bool:
        return self._state.closed

    def upload(self, stream: Stream) -> None:
        cuda, state = _state_of_stream(stream)
        cuda.upload(self._checked(), state)

    def launch(self, stream: Stream) -> None:
        cuda, state = _state_of_stream(stream)
        cuda.launch(self._checked(), state)

    def close(self) -> None:
        self._cuda.close_graph(self._state)

    def _checked(self) -> GraphState:
        if self._state.closed:
            self._cuda.break_rule("a closed graph was used")
        return self._state


class StridedMemoryView:
    """Where a tensor lies; strides in elements."""

    ptr: int
    device_id: int
    is_device_accessible: bool
    readonly: bool
    exporting_obj: object
    _layout: Layout
    _keeps: object

    def __init__(self, obj: object = None, stream_ptr: int | None = None) -> None:
        raise DeprecationWarning("Constructing a StridedMemoryView directly is deprecated")

    @classmethod
    def _of(cls, layout: Layout, owner: object, keeps: object = None) -> "StridedMemoryView":
        self = object.__new__(cls)
        self.ptr, self.readonly, self.exporting_obj = layout.address, layout.read_only, owner
        self.device_id = -1 if layout.device[0] == CPU else layout.device[1]
        self.is_device_accessible = layout.device[0] in (CUDA, CUDA_HOST)
        self._layout, self._keeps = layout, keeps
        return self

    @classmethod
    def from_buffer(
        cls,
        buffer: Buffer,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        *,
        itemsize: int | None = None,
        dtype: "np.dtype[Any] | None" = None,
        is_readonly: bool = False,
    ) -> "StridedMemoryView":
        if dtype is None and itemsize is None:
            raise ValueError("Either itemsize or dtype must be specified")
        kind = np.dtype(dtype) if dtype is not None else np.dtype(f"V{itemsize}")
        count = 1 + sum((n - 1) * s for n, s in zip(shape, strides or dense(shape), strict=True))
        needed = 0 if 0 in shape else count * kind.itemsize
        if needed > buffer.size:
            raise ValueError(
                f"Buffer size is too small for the layout. Expected at least {needed} bytes, got {buffer.size} bytes."
            )
        device = buffer.__dlpack_device__()
        return cls._of(Layout(int(buffer.handle), device, tuple(shape), strides, kind, is_readonly), buffer)

    @classmethod
    def from_dlpack(cls, obj: Any, stream_ptr: int | None = None) -> "StridedMemoryView":
        if stream_ptr is None:
            raise BufferError("stream=None is ambiguous with view()")
        on_cpu = obj.__dlpack_device__()[0] == CPU
        capsule = obj.__dlpack__(stream=None if on_cpu else stream_ptr)
        layout = fake_dlpack.layout_of(capsule)
        return cls._of(layout, obj, None if fake_dlpack.release(capsule) else capsule)

    @classmethod
    def from_any_interface(cls, obj: Any, stream_ptr: int | None = None) -> "StridedMemoryView":
        if not hasattr(obj, "__dlpack__"):
            raise BufferError("the input object does not support any data exchange protocol")
        return cls.from_dlpack(obj, stream_ptr)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._layout.shape

    @property
    def strides(self) -> tuple[int, ...] | None:
        return self._layout.strides

    @property
    def dtype(self) -> "np.dtype[Any]":
        return self._layout.dtype

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._layout.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        return fake_dlpack.capsule_of(self._layout, self)


def array_of(view: Any) -> "np.ndarray[Any, Any]":
    """A copy of what a view, or anything else with DLPack, shows now, whatever device it claims; dense ones only."""
    capsule = view.__dlpack__()
    layout = fake_dlpack.layout_of(capsule)
    fake_dlpack.release(capsule)
    if layout.strides not in (None, dense(layout.shape)):
        raise ValueError(f"strides {layout.strides} of shape {layout.shape} are not dense")
    count = int(np.prod(layout.shape))
    raw = _gpu().bytes_at(layout.address, count * layout.dtype.itemsize)
    return raw.view(layout.dtype).reshape(layout.shape)


def _gpu() -> FakeCuda:
    if _installed is None:
        raise AssertionError("fake_cuda is not installed")
    return _installed


def _started() -> FakeCuda:
    """What cuInit does."""
    cuda = _gpu()
    if cuda.driver is None:
        raise DynamicLibNotFoundError(NO_DRIVER.format("cuda"))
    if not cuda.devices:
        raise cuda_error("CUDA_ERROR_NO_DEVICE")
    return cuda


def _nvml() -> FakeCuda:
    cuda = _gpu()
    if cuda.driver is None or not cuda.nvml:
        raise DynamicLibNotFoundError(NO_DRIVER.format("nvml"))
    return cuda


def _state(stream: Any) -> tuple[FakeCuda, StreamState]:
    """What a Stream or GraphBuilder stands for; raises TypeError as cuda.core does for anything else."""
    if stream is None:
        raise TypeError(
            "stream is required and must not be None; pass device.default_stream explicitly to use the default stream."
        )
    if not isinstance(stream, Stream | GraphBuilder):
        raise TypeError(f"Stream or GraphBuilder expected, got {type(stream).__name__}")
    cuda = getattr(stream, "_cuda", None) or _gpu()
    handle = stream.__cuda_stream__()[1]
    return cuda, cuda.stream(handle)


def _state_of_stream(stream: Any) -> tuple[FakeCuda, StreamState]:
    if not isinstance(stream, Stream):
        raise TypeError(f"Argument 'stream' has incorrect type (expected Stream, got {type(stream).__name__})")
    return _state(stream)


def _options(kind: type, options: Any, what: str) -> Any:
    if options is None:
        return kind()
    if isinstance(options, kind):
        return options
    if isinstance(options, dict):
        return kind(**options)
    raise TypeError(
        f"The {what} must be provided as an object of type {kind.__name__} or as a dict with valid {what}. The "
        f"provided object is '{options}'."
    )
