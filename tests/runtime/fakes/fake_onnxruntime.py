"""ONNX Runtime with a CUDA provider, on top of `fake_gpu`: the real library's CPU runs what the stream is given."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fake_errors import cuda_error
from fake_gpu import FakeCuda, Op
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
PLUG_IN_MODULE = "onnxruntime_ep_cuda"
PLUG_IN_PATH = "/site-packages/onnxruntime_ep_cuda/libonnxruntime_providers_cuda.so"
NO_SYNC = "disable_synchronize_execution_providers"
REAL_SESSION = onnxruntime.InferenceSession
ELEMENT_TYPES: dict[Any, Any] = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16}


def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, *, provider: bool = True) -> "FakeOnnxRuntime":
    """The real module with sessions on the GPU; without `provider` it is the CPU's wheel."""
    fake = FakeOnnxRuntime(cuda, REAL_SESSION)
    monkeypatch.setitem(sys.modules, PLUG_IN_MODULE, None)
    if provider:
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
        monkeypatch.setattr(onnxruntime, "InferenceSession", fake.session)
    else:
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    return fake


def install_plug_in(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, *, name: str = CUDA) -> "FakeOnnxRuntime":
    """The CPU's wheel, and a plug-in that brings the provider `name` once somebody registers it."""
    fake = install(monkeypatch, cuda, provider=False)
    fake.plug_in = name
    module = ModuleType(PLUG_IN_MODULE)
    module.__dict__.update(get_ep_name=lambda: name, get_library_path=lambda: PLUG_IN_PATH)
    monkeypatch.setitem(sys.modules, PLUG_IN_MODULE, module)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", fake.register)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", fake.devices)
    monkeypatch.setattr(onnxruntime, "SessionOptions", PlugInOptions)
    monkeypatch.setattr(onnxruntime, "InferenceSession", fake.session)
    return fake


@dataclass(frozen=True)
class EpDevice:
    """What OrtEpDevice is for one GPU of the plug-in."""

    ep_name: str
    ep_options: Mapping[str, str]
    ep_vendor: str = "Microsoft"
    ep_metadata: Mapping[str, str] = field(default_factory=dict)


class PlugInOptions(onnxruntime.SessionOptions):  # type: ignore[misc]
    """SessionOptions that keep the devices of the plug-in, because the real library knows none."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: tuple[Sequence[EpDevice], Mapping[str, str]] | None = None

    def add_provider_for_devices(self, devices: Sequence[EpDevice], options: Mapping[str, str]) -> None:
        if len(devices) != 1 or not all(isinstance(text, str) for each in options.items() for text in each):
            raise InvalidArgument("CUDA EP factory currently supports exactly one device per EP instance.")
        self.chosen = (devices, options)


class FakeOnnxRuntime:
    """The controller: what was loaded and run, and what shall fail."""

    def __init__(self, cuda: FakeCuda, real: Any) -> None:
        self.cuda = cuda
        self.real = real
        self.loaded: list[str] = []
        self.runs: Counter[str] = Counter()
        self.starts = True
        self.plug_in = CUDA
        self.registered: list[tuple[str, str]] = []
        self._load_failure: str | None = None
        self._failure: str | None = None
        self._run_failure: str | None = None

    def fail_load(self, message: str) -> None:
        """Let the next session with CUDA fail."""
        self._failure = message

    def fail_register(self, message: str) -> None:
        """Let the next registration of the plug-in fail."""
        self._load_failure = message

    def fail_run(self, message: str) -> None:
        """Let the next run with CUDA fail."""
        self._run_failure = message

    def cannot_start(self) -> None:
        """Let sessions fall back to the CPU, as where cuDNN is missing."""
        self.starts = False

    def register(self, registration_name: str, library_path: str) -> None:
        """In the place of register_execution_provider_library."""
        if self._load_failure is not None:
            message, self._load_failure = self._load_failure, None
            raise Fail(f"[ONNXRuntimeError] : 1 : FAIL : Failed to load library {library_path} with error: {message}")
        if registration_name in (name for name, _ in self.registered):
            raise Fail(f"[ONNXRuntimeError] : 1 : FAIL : library {registration_name} is already registered")
        self.registered.append((registration_name, library_path))

    def devices(self) -> list[EpDevice]:
        """In the place of get_ep_devices."""
        gpus = range(len(self.cuda.devices)) if self.registered else ()
        return [EpDevice(CPU, {}), *(EpDevice(self.plug_in, {"device_id": str(ordinal)}) for ordinal in gpus)]

    def session(
        self,
        path_or_bytes: Any,
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[Mapping[Any, Any]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """In the place of InferenceSession."""
        wanted = _options_of(providers or (), provider_options)
        chosen = getattr(sess_options, "chosen", None)
        if chosen is not None:
            if providers:
                self.cuda.break_rule("a session with providers ignores the devices of its options")
            wanted = {**chosen[0][0].ep_options, **chosen[1]}
        if wanted is None:
            return self.real(path_or_bytes, sess_options, providers, provider_options, **kwargs)
        if self._failure is not None:
            message, self._failure = self._failure, None
            raise Fail(message)
        if not self.starts:
            return self.real(path_or_bytes, sess_options, [CPU], **kwargs)
        self.cuda.enter("load", unsafe=True, note=(_name_of(path_or_bytes),))
        session = CudaSession(self, path_or_bytes, sess_options, wanted)
        self.loaded.append(session.name)
        return session

    def take_run_failure(self) -> None:
        if self._run_failure is not None:
            message, self._run_failure = self._run_failure, None
            raise Fail(message)


class CudaSession:
    """What InferenceSession is with the CUDA provider first."""

    def __init__(self, fake: FakeOnnxRuntime, model: Any, own: Any, options: Mapping[str, str]) -> None:
        self.name = _name_of(model)
        self._fake = fake
        self._device = int(options.get("device_id", 0))
        self._handle = int(options.get("user_compute_stream", 0))
        if fake.cuda.stream(self._handle).device != self._device:
            fake.cuda.break_rule(f"session {self.name}: its stream is of another GPU than {self._device}")
        own = onnxruntime.SessionOptions() if own is None else own
        own.intra_op_num_threads = 1
        own.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = fake.real(model, own, providers=[CPU])

    def get_providers(self) -> list[str]:
        return [self._fake.plug_in, CPU]

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def io_binding(self) -> "CudaBinding":
        return CudaBinding(self)

    def run_with_iobinding(self, iobinding: "CudaBinding", run_options: Any = None) -> None:
        """Enqueue it on the session's stream; wait for it unless the options say not to."""
        fake, cuda = self._fake, self._fake.cuda
        with cuda.lock:
            fake.take_run_failure()
            cuda.enter("run", note=(self.name,))
            state = cuda.stream(self._handle)
            cuda.forbid_in_capture()
            if state.capture is not None:
                state.capture.invalid = True
                raise cuda_error("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
            if state.device != self._device:
                cuda.break_rule(f"session {self.name}: its stream is of another GPU")
            run, reads, writes = iobinding.bound()
            cuda.enqueue(state, Op(("onnxruntime", self.name), run, reads, writes))
            cuda.counts["engine_runs"] += 1
            fake.runs[self.name] += 1
            if not _says_no_sync(run_options):
                cuda.counts["syncs"] += 1
                cuda.drain(state)


class CudaBinding:
    """What IOBinding is for such a session; everything is bound by address on the GPU."""

    def __init__(self, session: CudaSession) -> None:
        self._session = session
        self._inputs: dict[str, tuple[Any, tuple[int, ...], int]] = {}
        self._outputs: dict[str, tuple[Any, tuple[int, ...], int]] = {}

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Sequence[int], buffer_ptr: int
    ) -> None:
        self._inputs[name] = self._checked(name, device_type, device_id, element_type, shape, buffer_ptr)

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Sequence[int] | None = None,
        buffer_ptr: int | None = None,
    ) -> None:
        self._outputs[name] = self._checked(name, device_type, device_id, element_type, shape, buffer_ptr)

    def bound(self) -> tuple[Callable[[], None], list[Any], list[Any]]:
        """The run, what it reads and what it writes."""
        session, cuda = self._session, self._session._fake.cuda
        for values, places in ((session.get_inputs(), self._inputs), (session.get_outputs(), self._outputs)):
            missing = [each.name for each in values if each.name not in places]
            if missing:
                cuda.break_rule(f"session {session.name}: {', '.join(missing)} are not bound")
        reads, writes = (
            {
                name: cuda.span(address, _nbytes(dtype, shape), f"session {session.name}, {name}")
                for name, (dtype, shape, address) in places.items()
            }
            for places in (self._inputs, self._outputs)
        )
        for one, read in reads.items():
            for other, written in writes.items():
                if read.overlaps(written):
                    cuda.break_rule(f"session {session.name}: {one} and {other} overlap")
        inputs, outputs, real = dict(self._inputs), dict(self._outputs), session._session

        def run() -> None:
            binding = real.io_binding()
            for name, (dtype, shape, address) in inputs.items():
                binding.bind_input(name, "cpu", 0, dtype, shape, address)
            for name, (dtype, shape, address) in outputs.items():
                binding.bind_output(name, "cpu", 0, dtype, shape, address)
            real.run_with_iobinding(binding)

        return run, list(reads.values()), list(writes.values())

    def _checked(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, address: int | None
    ) -> tuple[Any, tuple[int, ...], int]:
        session, cuda = self._session, self._session._fake.cuda
        if (device_type, int(device_id)) != ("cuda", session._device):
            cuda.break_rule(f"session {session.name}: {name} is bound on {device_type}:{device_id}")
        if not address or shape is None or element_type is None:
            cuda.break_rule(f"session {session.name}: {name} is bound without type, shape or address")
        dtype = ELEMENT_TYPES[element_type] if isinstance(element_type, int) else np.dtype(element_type).type
        return dtype, tuple(int(dim) for dim in shape), int(address or 0)


def _name_of(model: Any) -> str:
    """The name of a graph, from its path or its bytes."""
    return Path(model).stem if isinstance(model, str | Path) else str(onnx.load_from_string(model).graph.name)


def _options_of(
    providers: Sequence[Any], provider_options: Sequence[Mapping[Any, Any]] | None
) -> dict[str, str] | None:
    """The CUDA provider's options, None when it is not asked for."""
    for index, provider in enumerate(providers):
        name, options = provider if isinstance(provider, tuple) else (provider, {})
        if provider_options is not None:
            options = provider_options[index]
        if name == CUDA:
            return {str(key): str(value) for key, value in options.items()}
    return None


def _says_no_sync(run_options: Any) -> bool:
    try:
        return run_options is not None and run_options.get_run_config_entry(NO_SYNC) == "1"
    except RuntimeError:  # no such entry
        return False


def _nbytes(dtype: Any, shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
