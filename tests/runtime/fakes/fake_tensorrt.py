"""The names of TensorRT's runtime, on top of `fake_gpu`: a plan file points to an ONNX file that the CPU runs."""

import ctypes
import enum
import itertools
import json
import math
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fake_errors import CUDAError, cuda_error
from fake_gpu import Capture, FakeCuda, Op, StreamState
from fake_memory import ALIGNMENT, Span

MAGIC = b"FAKEPLAN"
VERSION = "10.13.3.9"
GARBAGE = 0xCD
DYNAMIC = -1
FATAL_ONLY = 4

Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
Ports = dict[str, tuple[str, tuple[int | str, ...]]]


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    BF16 = 7
    INT64 = 8


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY = 0
    NONE = 1
    DETAILED = 2


DATA_TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(int32)": (DataType.INT32, np.int32),
    "tensor(int64)": (DataType.INT64, np.int64),
    "tensor(int8)": (DataType.INT8, np.int8),
    "tensor(uint8)": (DataType.UINT8, np.uint8),
    "tensor(bool)": (DataType.BOOL, np.bool_),
}


class Dims(tuple[int, ...]):
    """A shape, as TensorRT hands it out."""


class ILogger:
    """What hears the library's words; a subclass that has an `__init__` must call this one's."""

    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def __init__(self) -> None:
        self._constructed = True

    def log(self, severity: Severity, msg: str) -> None:
        """For subclasses."""


class Logger(ILogger):
    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        super().__init__()
        self.min_severity = min_severity


def write_plan(
    path: Path,
    onnx_path: Path,
    *,
    profile: Profile,
    scratch_bytes: int,
    name: str,
    version: str = VERSION,
    sm: str = "sm90",
    truncated: bool = False,
) -> Path:
    """A file that the fake library takes for an engine; inputs that `profile` leaves out have a fixed shape."""
    text = json.dumps(
        {
            "onnx": str(Path(onnx_path).resolve()),
            "profile": {each: [list(map(int, shape)) for shape in shapes] for each, shapes in profile.items()},
            "scratch_bytes": scratch_bytes,
            "name": name,
            "version": version,
            "sm": sm,
        }
    ).encode()
    whole = MAGIC + len(text).to_bytes(8, "little") + text
    path.write_bytes(whole[: len(whole) // 2] if truncated else whole)
    return path


def install(
    monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, *, module: str = "tensorrt", version: str = VERSION
) -> "FakeTensorRT":
    """The library as `module`; the two differ in what contexts can be asked."""
    fake = FakeTensorRT(cuda, version)
    monkeypatch.setitem(sys.modules, module, fake.as_module(module))
    return fake


class FakeTensorRT:
    """The controller: what was loaded and run, and what shall be refused."""

    def __init__(self, cuda: FakeCuda, version: str) -> None:
        self.cuda = cuda
        self.version = version
        self.deserialized: list[str] = []
        self.sessions = 0
        self.contexts = 0
        self.runs: Counter[str] = Counter()
        self.said: list[tuple[Severity, str]] = []
        self.uncapturable = False
        self.lock = threading.RLock()
        self._alive: weakref.WeakSet[IExecutionContext] = weakref.WeakSet()
        self._refused: list[tuple[str, str | None]] = []

    @property
    def live_contexts(self) -> int:
        """Contexts that someone still holds."""
        return len(self._alive)

    def refuse(self, call: str, name: str | None = None, times: int = 1) -> None:
        """Let `set_input_shape`, `set_tensor_address`, `execute_async_v3` or `create_execution_context` fail.

        `name` limits it to a tensor or an engine.
        """
        self._refused += [(call, name)] * times

    def as_module(self, name: str) -> ModuleType:
        """A module with the names of the library."""
        module: Any = ModuleType(name)
        module.__version__ = self.version
        for thing in (
            ILogger,
            Logger,
            TensorIOMode,
            TensorLocation,
            DataType,
            ExecutionContextAllocationStrategy,
            ProfilingVerbosity,
            ICudaEngine,
            IRuntimeConfig,
        ):
            setattr(module, thing.__name__, thing)
        module.IExecutionContext = IExecutionContext
        if name == "tensorrt_rtx":
            module.IExecutionContext = RtxExecutionContext
            module.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
        module.Runtime = type("Runtime", (Runtime,), {"_fake": self, "_context_type": module.IExecutionContext})
        return module

    def refused(self, call: str, *names: str) -> bool:
        """Whether a test wants this call to fail."""
        for entry in self._refused:
            if entry[0] == call and (entry[1] is None or entry[1] in names):
                self._refused.remove(entry)
                return True
        return False

    def say(self, logger: ILogger, severity: Severity, words: str) -> None:
        self.said.append((severity, words))
        logger.log(severity, words)


class Runtime:
    _fake: FakeTensorRT
    _context_type: "type[IExecutionContext]"

    def __init__(self, logger: ILogger) -> None:
        if not getattr(logger, "_constructed", False):
            raise TypeError("__init__(): incompatible constructor arguments, or ILogger.__init__() was not called")
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "ICudaEngine | None":
        """None after words to the logger when it is no engine for this library and GPU."""
        with memoryview(serialized_engine) as view:
            data = bytes(view)
        fake, cuda = self._fake, self._fake.cuda
        with fake.lock, cuda.lock:
            try:
                cuda.enter("deserialize", unsafe=True, note=(len(data),))
            except CUDAError as error:
                return self._refuse(_words("IRuntime::deserializeCudaEngine", error))
            if cuda.current is None:
                cuda.break_rule("an engine was loaded on a thread where no GPU is current")
            fake.say(self.logger, Severity.INFO, f"Loaded engine size: {len(data) >> 20} MiB")
            header, text = data[:16], data[16:]
            if header[:8] != MAGIC:
                return self._refuse(
                    "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion "
                    "header.magicTag == kEXPECTED_MAGIC_TAG failed.)"
                )
            if len(text) != int.from_bytes(header[8:], "little"):
                return self._refuse(
                    "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion "
                    f"header.size <= size failed. {len(data)} bytes were given)"
                )
            plan = json.loads(text)
            if plan["version"] != fake.version:
                return self._refuse(
                    "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion "
                    "stdVersionRead == kSERIALIZATION_VERSION failed. Version tag does not match. Note: Current "
                    f"Version: {fake.version}, Serialized Engine Version: {plan['version']})"
                )
            here = "sm{}{}".format(*cuda.devices[cuda.current].capability)
            if plan["sm"] != here:
                return self._refuse(
                    "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is generated "
                    f"on an incompatible device, expecting compute {here} got compute {plan['sm']}, please rebuild.)"
                )
            engine = ICudaEngine(fake, self.logger, self._context_type, plan, cuda.current)
            fake.deserialized.append(plan["name"])
            return engine

    def _refuse(self, words: str) -> None:
        self._fake.say(self.logger, Severity.ERROR, words)
        self._fake.say(
            self.logger,
            Severity.ERROR,
            "IRuntime::deserializeCudaEngine: Error Code 4: Internal Error (Engine deserialization failed.)",
        )


class ICudaEngine:
    def __init__(
        self,
        fake: FakeTensorRT,
        logger: ILogger,
        context_type: "type[IExecutionContext]",
        plan: Mapping[str, Any],
        device: int,
    ) -> None:
        self._fake, self._logger, self._context_type, self._device = fake, logger, context_type, device
        self.name: str = plan["name"]
        self.device_memory_size_v2: int = plan["scratch_bytes"]
        self.num_optimization_profiles = 1
        self.num_aux_streams = 0
        self._session = _session(plan["onnx"])
        fake.sessions += 1
        self._inputs: Ports = {each.name: (each.type, _shape(each.shape)) for each in self._session.get_inputs()}
        self._outputs: Ports = {each.name: (each.type, _shape(each.shape)) for each in self._session.get_outputs()}
        self._ports: Ports = {**self._inputs, **self._outputs}
        self._profile: dict[str, tuple[tuple[int, ...], ...]] = {
            each: tuple(tuple(shape) for shape in shapes) for each, shapes in plan["profile"].items()
        }
        for each, (_, shape) in self._inputs.items():
            if each not in self._profile:
                if not all(isinstance(dim, int) for dim in shape):
                    raise ValueError(f"plan {self.name}: {each} is {shape}, and has no profile")
                self._profile[each] = (shape,) * 3  # type: ignore[assignment]
        self._names = list(self._ports)

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        if name in self._inputs:
            return TensorIOMode.INPUT
        return TensorIOMode.OUTPUT if name in self._outputs else TensorIOMode.NONE

    def get_tensor_dtype(self, name: str) -> DataType:
        return DATA_TYPES[self._ports[name][0]][0]

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(dim if isinstance(dim, int) else DYNAMIC for dim in self._ports[name][1])

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        if name not in self._inputs or profile_index != 0:
            self._fake.cuda.break_rule(f"engine {self.name}: {name} has no shapes in profile {profile_index}")
        return [Dims(shape) for shape in self._profile[name]]

    def create_runtime_config(self) -> "IRuntimeConfig":
        return IRuntimeConfig()

    def create_execution_context(
        self,
        strategy: "ExecutionContextAllocationStrategy | IRuntimeConfig" = ExecutionContextAllocationStrategy.STATIC,
    ) -> "IExecutionContext | None":
        fake, cuda = self._fake, self._fake.cuda
        config = strategy if isinstance(strategy, IRuntimeConfig) else IRuntimeConfig()
        if not isinstance(strategy, IRuntimeConfig):
            config.set_execution_context_allocation_strategy(strategy)
        with fake.lock, cuda.lock:
            try:
                cuda.enter("create_execution_context", self._device, unsafe=True, note=(self.name,))
            except CUDAError as error:
                fake.say(self._logger, Severity.ERROR, _words("ICudaEngine::createExecutionContext", error))
                return None
            if fake.refused("create_execution_context", self.name):
                fake.say(
                    self._logger,
                    Severity.ERROR,
                    "ICudaEngine::createExecutionContext: Error Code 4: Internal Error (the test wants none)",
                )
                return None
            context = self._context_type(self, config)
            fake.contexts += 1
            fake._alive.add(context)
            return context


class IRuntimeConfig:
    """How contexts are made; only TensorRT-RTX compiles kernels for the shapes that it meets."""

    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self._allocation = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> None:
        self._allocation = strategy

    def get_execution_context_allocation_strategy(self) -> ExecutionContextAllocationStrategy:
        return self._allocation


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self.engine = engine
        self.name = ""
        self.nvtx_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self._fake = engine._fake
        self._config = config
        self._managed = config._allocation is ExecutionContextAllocationStrategy.USER_MANAGED
        self._token = object()
        self._shapes = {name: shapes[0] for name, shapes in engine._profile.items() if shapes[0] == shapes[2]}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._inferred: dict[str, tuple[int, ...]] | None = None
        self._last: Op | None = None
        self._needed: int = engine.device_memory_size_v2
        self._warmed: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()
        weakref.finalize(self, _dropped, self._fake.cuda, self._token, engine.name)

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        """False, after words, for a name, rank or size that no profile has."""
        engine, wanted = self.engine, tuple(int(dim) for dim in shape)
        if self._fake.refused("set_input_shape", name):
            return self._say("setInputShape", "the test wants it refused")
        if name not in engine._inputs:
            return self._say("setInputShape", f"Given invalid tensor name: {name}.")
        low, _, high = engine._profile[name]
        if len(wanted) != len(low) or not all(a <= n <= b for a, n, b in zip(low, wanted, high, strict=True)):
            return self._say(
                "setInputShape",
                f"Parameter check failed, condition: satisfyProfile. Set dimension {list(wanted)} for tensor {name} "
                f"does not satisfy any optimization profiles. Valid range for profile 0: {list(low)}..{list(high)}.",
            )
        if self._shapes.get(name) != wanted:
            self._needed = self.engine.device_memory_size_v2
            if self._fake.cuda.owns_captured_work(self._token):
                self._break(f"the shape of {name} changes while an open graph holds runs of the context")
            self._shapes[name] = wanted
            self._inferred = None
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._fake.refused("set_tensor_address", name):
            return self._say("setTensorAddress", "the test wants it refused")
        if name not in self.engine._ports:
            return self._say("setTensorAddress", f"Given invalid tensor name: {name}.")
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def get_tensor_shape(self, name: str) -> Dims:
        known = {**self._shapes, **(self._inferred or {})}
        return Dims(known.get(name, self.engine.get_tensor_shape(name)))

    def infer_shapes(self) -> list[str]:
        """Names of the inputs that have no shape; RuntimeError where shapes contradict one another."""
        missing = [name for name in self.engine._inputs if name not in self._shapes]
        if not missing:
            self._inferred = self._infer()
        return missing

    def update_device_memory_size_for_shapes(self) -> int:
        if any(name not in self._shapes for name in self.engine._inputs):
            self._break("scratch memory was asked for before every input had a shape")
        largest = max(math.prod(high) / max(math.prod(self._shapes[name]), 1) for name, high in self._largest())
        self._needed = math.ceil(self.engine.device_memory_size_v2 / largest)
        return self._needed

    def _largest(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, shapes[-1]) for name, shapes in self.engine._profile.items()]

    def set_device_memory(self, memory: int, size: int) -> None:
        if not self._managed:
            self._break("it has memory of its own; create it USER_MANAGED")
        self._memory = int(memory), int(size)

    def execute_async_v3(self, stream_handle: Any) -> bool:
        fake, cuda, engine = self._fake, self._fake.cuda, self.engine
        with fake.lock, cuda.lock:
            state = cuda.stream(int(stream_handle))
            try:
                cuda.enter("execute", engine._device, note=(engine.name,))
                if fake.refused("execute_async_v3", engine.name):
                    return self._say("enqueueV3", "the test wants it refused")
                self._check_stream(state)
                shapes = self._checked_shapes()
                inputs = {name: self._span(name, shapes) for name in engine._inputs}
                outputs = {name: self._span(name, shapes) for name in engine._outputs}
                scratch = self._checked_scratch()
                self._check_overlaps(inputs, outputs, scratch)
                key = tuple(sorted(self._shapes.items()))
                if state.capture is not None:
                    self._check_capture(state.capture, key)
                op = Op(
                    ("engine", engine.name),
                    _run_of(engine, dict(self._addresses), shapes, scratch),
                    reads=list(inputs.values()),
                    writes=[*outputs.values(), *scratch],
                    owner=self._token,
                )
                captured = state.capture is not None
                cuda.enqueue(state, op)
            except CUDAError as error:
                fake.say(engine._logger, Severity.ERROR, _words("IExecutionContext::enqueueV3", error))
                return False
            if not captured:
                self._warmed.add(key)
                self._last = op
            cuda.counts["engine_runs"] += 1
            fake.runs[engine.name] += 1
            return True

    def _infer(self) -> dict[str, tuple[int, ...]]:
        sizes: dict[str, int] = {}
        for name, (_, dims) in self.engine._inputs.items():
            for dim, size in zip(dims, self._shapes[name], strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise RuntimeError(f"{name}: {dim} is {size} here and {sizes[dim]} elsewhere")
        shapes = {}
        for name, (_, dims) in self.engine._outputs.items():
            try:
                shapes[name] = tuple(_size(dim, sizes) for dim in dims)
            except KeyError as error:
                raise NotImplementedError(f"the fake cannot tell {error} of output {name} from the inputs") from error
        return shapes

    def _check_stream(self, state: StreamState) -> None:
        if state.device != self.engine._device:
            self._break(f"it was loaded on GPU {self.engine._device}, the stream is of GPU {state.device}")
        if self._last is not None and not self._fake.cuda.ordered(self._last, state):
            self._break("one context runs on two streams that are not ordered")

    def _checked_shapes(self) -> dict[str, tuple[int, ...]]:
        missing = [name for name in self.engine._inputs if name not in self._shapes]
        if missing:
            self._break(f"{', '.join(missing)} have no shape")
        if self._inferred is None:
            self._break("infer_shapes was not asked since a shape changed")
        return {**self._shapes, **(self._inferred or {})}

    def _span(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Span:
        address = self._addresses.get(name)
        if not address:
            self._break(f"{name} has no address")
        if (address or 0) % ALIGNMENT:
            self._break(f"{name} lies at {address:#x}, which is not 256-byte aligned")
        nbytes = int(np.prod(shapes[name], dtype=np.int64)) * np.dtype(self._numpy(name)).itemsize
        return self._fake.cuda.span(address or 0, nbytes, f"engine {self.engine.name}, {name}")

    def _checked_scratch(self) -> list[Span]:
        needed = self._needed
        if not needed or not self._managed:
            return []
        address, size = self._memory or (0, 0)
        if size < needed:
            self._break(f"its scratch is {size} bytes, it needs {needed}")
        if address % ALIGNMENT:
            self._break(f"its scratch lies at {address:#x}, which is not 256-byte aligned")
        return [self._fake.cuda.span(address, needed, f"engine {self.engine.name}, scratch")]

    def _check_overlaps(self, inputs: Mapping[str, Span], outputs: Mapping[str, Span], scratch: list[Span]) -> None:
        written = [*outputs.items(), *(("scratch", span) for span in scratch)]
        for (one, first), (other, second) in itertools.chain(
            itertools.product(inputs.items(), written), itertools.combinations(written, 2)
        ):
            if first.overlaps(second):
                self._break(f"{one} and {other} overlap")

    def _check_capture(self, capture: Capture, key: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
        if self._fake.uncapturable or key not in self._warmed:
            capture.invalid = True
            raise cuda_error("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    def _numpy(self, name: str) -> Any:
        return DATA_TYPES[self.engine._ports[name][0]][1]

    def _say(self, call: str, words: str) -> bool:
        said = f"IExecutionContext::{call}: Error Code 3: API Usage Error ({words})"
        self._fake.say(self.engine._logger, Severity.ERROR, said)
        return False

    def _break(self, what: str) -> None:
        self._fake.cuda.break_rule(f"engine {self.engine.name}: {what}")


class RtxExecutionContext(IExecutionContext):
    """What TensorRT-RTX adds: kernels for just these shapes come later, unless they were asked for at once."""

    def _check_capture(self, capture: Capture, key: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
        varies = any(low != high for low, _, high in self.engine._profile.values())
        lazy = self._config.dynamic_shapes_kernel_specialization_strategy
        if varies and lazy is DynamicShapesKernelSpecializationStrategy.LAZY:
            self._break("the capture keeps the kernels for any shape; ask for EAGER specialization")
        super()._check_capture(capture, key)

    def is_stream_capturable(self, stream: Any) -> bool:
        self._fake.cuda.stream(int(stream))
        return not self._fake.uncapturable


def _run_of(
    engine: ICudaEngine, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], scratch: list[Span]
) -> Callable[[], None]:
    """The run on addresses and shapes as they are now; it leaves garbage in its scratch."""
    session, inputs, outputs = engine._session, list(engine._inputs), list(engine._outputs)
    types = {name: DATA_TYPES[engine._ports[name][0]][1] for name in engine._ports}

    def run() -> None:
        binding = session.io_binding()
        for name in inputs:
            binding.bind_input(name, "cpu", 0, types[name], shapes[name], addresses[name])
        for name in outputs:
            binding.bind_output(name, "cpu", 0, types[name], shapes[name], addresses[name])
        session.run_with_iobinding(binding)
        for span in scratch:
            ctypes.memset(span.allocation.address + span.low, GARBAGE, span.high - span.low)

    return run


def _dropped(cuda: FakeCuda, token: object, name: str) -> None:
    """A context is gone: nothing may still want to run it."""
    if cuda.owns_captured_work(token):
        cuda.broken.append(f"engine {name}: a context was dropped while an open graph holds its runs")
    if cuda.owns_pending_work(token):
        cuda.broken.append(f"engine {name}: a context was dropped while its runs are pending")


def _session(path: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    """The size of a dimension that is a number, a name or a product of both, as 2*B."""
    if isinstance(dim, int) or dim in sizes:
        return sizes[dim] if isinstance(dim, str) else dim
    return math.prod(int(part) if part.isdecimal() else sizes[part] for part in dim.split("*"))


def _shape(dims: Sequence[Any]) -> tuple[int | str, ...]:
    return tuple(dim if isinstance(dim, int) else str(dim) for dim in dims)


def _words(call: str, error: CUDAError) -> str:
    """As TensorRT tells an error of CUDA: in the runtime's lower-case words, not by the driver's name of it."""
    name = str(error).partition(":")[0]
    known = {
        "CUDA_ERROR_OUT_OF_MEMORY": "Error Code 2: OutOfMemory (Requested size was 1048576 bytes.)",
        "CUDA_ERROR_ILLEGAL_ADDRESS": "Error Code 1: Cuda Runtime (an illegal memory access was encountered)",
        "CUDA_ERROR_LAUNCH_FAILED": "Error Code 1: Cuda Runtime (unspecified launch failure)",
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "Error Code 1: Cuda Runtime (operation not permitted when stream is "
        "capturing)",
        "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "Error Code 1: Cuda Runtime (operation failed due to a previous error "
        "during capture)",
    }
    return f"{call}: {known.get(name, f'Error Code 1: Cuda Runtime ({name})')}"
