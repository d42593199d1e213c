"""Runs a graph as a TensorRT or TensorRT-RTX engine on one GPU; the module of the library is a parameter."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from ilf_trt.contract.driver import extra_to_install
from ilf_trt.contract.held_file import HeldFile
from ilf_trt.contract.ports import Graph
from ilf_trt.contract.target import Library
from ilf_trt.errors import (
    DeviceError,
    DeviceLost,
    EngineError,
    InvalidRequest,
    MissingDependency,
    OutOfMemory,
    PortMismatch,
    one_line,
)
from ilf_trt.runtime.engine import Launch

from .cuda import ALIGNMENT, Stream
from .errors import device_error
from .scratch import Scratch

log = logging.getLogger(__name__)

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
PROFILE = 0


class TensorRT:
    """The library on this machine: one runtime, and the last errors that it logged."""

    def __init__(self, library: Library) -> None:
        """Raises MissingDependency if the library is not installed."""
        try:
            self.module: Any = import_module(library.module)
        except (ImportError, OSError) as error:
            raise MissingDependency(
                f"the bundle's {library} engines need {library.module} ({one_line(error)}); pip install "
                + extra_to_install(library)
            ) from error
        self.library = library
        self.version = str(self.module.__version__)
        self._logger = _logger_of(self.module)
        self._runtime: Any = None

    def load(self, graph: Graph, file: HeldFile, stream: Stream) -> "TensorRTEngine":
        """The engine in `file` on the GPU of `stream`; raises EngineError, OutOfMemory, DeviceLost, PortMismatch."""
        if self._runtime is None:
            self._runtime = self.module.Runtime(self._logger)
        self._logger.errors.clear()
        if not file.size_bytes:
            raise EngineError(f"{file.path} is no {self.library} engine, it is empty; compile the bundle again")
        engine = self._runtime.deserialize_cuda_engine(file.map())
        if engine is None:
            raise self.error(
                f"{graph.name}: {self.library} refused {file.path}", "compile the bundle again with", stream
            )
        return TensorRTEngine(graph, engine, self)

    def error(self, what: str, hint: str, stream: Stream) -> EngineError | DeviceError:
        """The error for a call that failed: the GPU's error if the stream is broken, else the library's.

        This method waits for the stream only. To wait for the whole GPU would break the captures of other threads.
        """
        reasons = tuple(self._logger.errors) or ("the library gave no reason",)
        self._logger.errors.clear()
        for reason in reasons:
            error = device_error(what, reason)
            if isinstance(error, OutOfMemory | DeviceLost):
                return error
        try:
            stream.sync()
        except DeviceLost:
            raise
        except DeviceError:
            log.debug("a stream cannot report its errors during a capture")
        return EngineError(f"{what}: {one_line(reasons[0])}; {hint} --target {self.library}")


class TensorRTEngine:
    """One engine; all its contexts share one copy of the weights on the GPU."""

    capturable = True

    def __init__(self, graph: Graph, engine: Any, library: TensorRT) -> None:
        """Raises PortMismatch if the engine has other ports than `graph`."""
        self.graph = graph
        self._engine = engine
        self._library = library
        self._check_ports()

    def context(self, shapes: Mapping[str, tuple[int, ...]], stream: Stream, scratch: Scratch) -> "TensorRTContext":
        """A context that runs the engine on `stream`, in `scratch`, with inputs of exactly these shapes.

        It needs as much scratch memory as these shapes do, which may be far less than the engine's largest need.
        Raises InvalidRequest for a shape outside the engine's profile, EngineError, OutOfMemory.
        """
        if self._engine is None:
            raise EngineError(f"{self.graph.name}: the engine is closed; load the bundle again")
        for port in self.graph.inputs:
            if not all(isinstance(dim, int) for dim in port.shape):
                self._check_profile(port.name, shapes[port.name])
        context = self._engine.create_execution_context(self._strategy())
        if context is None:
            raise self.error("no execution context could be created", stream)
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self.error(f"shape {shape} of {name} was refused", stream)
        missing = context.infer_shapes()
        if missing:
            raise self.error(f"shapes of {', '.join(missing)} are not known", stream)
        scratch_bytes = int(context.update_device_memory_size_for_shapes())
        if scratch_bytes < 0:
            raise self.error("the scratch memory for these shapes is not known", stream)
        return TensorRTContext(self, context, stream, scratch, scratch_bytes)

    def error(self, what: str, stream: Stream) -> EngineError | DeviceError:
        """The library's error about this engine."""
        return self._library.error(f"{self.graph.name}: {what}", "compile the bundle again with", stream)

    def close(self) -> None:
        self._engine = None

    def _strategy(self) -> Any:
        """Contexts use the caller's memory; those of TensorRT-RTX compile the kernels for their shapes at once.

        By default, TensorRT-RTX runs generic kernels while it compiles. A capture would keep the generic kernels.
        """
        trt = self._library.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._library.library is not Library.TENSORRT_RTX:
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return config

    def _check_ports(self) -> None:
        engine, trt = self._engine, self._library.module
        got = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            side = "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
            dtype = engine.get_tensor_dtype(name).name
            host = engine.get_tensor_location(name) != trt.TensorLocation.DEVICE
            shape = tuple(int(size) for size in engine.get_tensor_shape(name))
            got[name] = (side, DTYPES.get(dtype, dtype), "host" if host else "device", shape)
        expected = {
            port.name: (side, port.dtype, "device", tuple(-1 if isinstance(dim, str) else dim for dim in port.shape))
            for side, ports in (("input", self.graph.inputs), ("output", self.graph.outputs))
            for port in ports
        }
        for name in sorted(got.keys() | expected.keys()):
            if not _agree(got.get(name), expected.get(name)):
                raise PortMismatch(
                    f"{self.graph.name}: port {name!r} is {_text(got.get(name))}, the manifest says "
                    f"{_text(expected.get(name))}; compile the bundle again"
                )

    def _check_profile(self, name: str, shape: tuple[int, ...]) -> None:
        low, _, high = (tuple(map(int, dims)) for dims in self._engine.get_tensor_profile_shape(name, PROFILE))
        if not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            what = "the plan's times" if name == "times" else name
            raise InvalidRequest(
                f"{self.graph.name}: {what} have shape {shape}, the engine takes {low} to {high}; pass fewer, or "
                "compile the bundle again "
                + ("from a plan with as many" if name == "times" else "with another --batch")
            )


class TensorRTContext:
    """One engine with fixed shapes; the addresses of ports and of scratch memory may change from run to run."""

    def __init__(
        self, engine: TensorRTEngine, context: Any, stream: Stream, scratch: Scratch, scratch_bytes: int
    ) -> None:
        self.scratch_bytes = scratch_bytes
        self._engine = engine
        self._context: Any = context
        self._stream = stream
        self._scratch = scratch
        self._addresses: dict[str, int] = {}
        self._scratch_address = 0

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> Launch:
        """A call that puts one run on the stream; raises PortMismatch if an address is not 256-byte aligned."""
        for name, address in addresses.items():
            if address % ALIGNMENT:
                raise PortMismatch(f"{self._engine.graph.name}: {name} lies at {address:#x}, not 256-byte aligned")
        addresses = dict(addresses)

        def launch() -> None:
            context, current = self._context, self._addresses
            if self.scratch_bytes and self._scratch_address != self._scratch.address:
                context.set_device_memory(self._scratch.address, self._scratch.size_bytes)
                self._scratch_address = self._scratch.address
            for name, address in addresses.items():
                if current.get(name) != address:
                    if not context.set_tensor_address(name, address):
                        raise self._engine.error(f"the address of {name} was refused", self._stream)
                    current[name] = address
            if not context.execute_async_v3(self._stream.handle):
                raise self._engine.error("the run failed", self._stream)

        return launch

    def check_capturable(self) -> None:
        """Raise EngineError if TensorRT-RTX says so; TensorRT has no such question."""
        is_capturable = getattr(self._context, "is_stream_capturable", None)
        if is_capturable is not None and not is_capturable(self._stream.handle):
            raise EngineError(f"the library says that graph {self._engine.graph.name} cannot be captured")

    def close(self) -> None:
        self._context = None


def _agree(got: tuple[Any, ...] | None, expected: tuple[Any, ...] | None) -> bool:
    """Whether two ports are equal; an engine for one batch may fix a size that the graph leaves open."""
    if got is None or expected is None or got[:3] != expected[:3] or len(got[3]) != len(expected[3]):
        return False
    return all(size in (-1, fixed) for fixed, size in zip(got[3], expected[3], strict=True))


def _text(port: tuple[Any, ...] | None) -> str:
    return f"{port[1]} {port[0]} {port[3]} on the {port[2]}" if port else "missing"


def _logger_of(module: Any) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]
        """Passes the library's messages to logging, and collects its errors."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            with suppress(Exception):  # called from C++
                line = " ".join(message.split())
                if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                    self.errors.append(line)
                log.debug("%s", line)

    return Logger()
