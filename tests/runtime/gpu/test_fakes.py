"""The stand-ins for CUDA, TensorRT and ONNX Runtime: each rule is broken once, and seen to be caught."""

import ctypes
import gc
import mmap
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import fake_cuda
import fake_onnxruntime
import fake_tensorrt
import numpy as np
import onnx
import onnxruntime
import pytest
from fake_cuda import CUDAError, FakeCuda, FakeGpu, RuleBroken
from fake_tensorrt import FakeTensorRT, Severity
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from tests.runtime.gpu.cuda_work import (
    SIZE,
    captured,
    core,
    device_memory,
    host_view,
    pinned_memory,
    work_on_threads,
)

SHAPE = (2, 4)
SCRATCH_BYTES = 512


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Two GPUs, the first current on this thread."""
    made = fake_cuda.install(monkeypatch, devices=(FakeGpu(), FakeGpu(name="other", capability=(8, 9))))
    core().Device(0).set_current()
    return made


@pytest.fixture
def stream(cuda: FakeCuda) -> Any:
    return core().Device(0).create_stream()


def values_at(cuda: FakeCuda, buffer: Any) -> set[int]:
    return set(cuda.bytes_at(int(buffer.handle), buffer.size).tolist())


def on_a_thread(work: Callable[[], Any]) -> list[BaseException]:
    """What `work` raised on a thread of its own."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except (Exception, AssertionError) as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised


# --- deferral


def test_a_copy_happens_at_the_sync(cuda: FakeCuda, stream: Any) -> None:
    target, source = device_memory(stream), pinned_memory(7)
    target.copy_from(source, stream=stream)
    assert values_at(cuda, target) == {fake_cuda.UNWRITTEN}
    stream.sync()
    assert values_at(cuda, target) == {7}


def test_staging_that_is_overwritten_before_the_sync_is_copied_as_it_is_then(cuda: FakeCuda, stream: Any) -> None:
    target, source = device_memory(stream), pinned_memory(7)
    source.copy_to(target, stream=stream)
    host_view(source)[:] = 8
    stream.sync()
    assert values_at(cuda, target) == {8}


def test_a_fill_repeats_its_pattern(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream, 8)
    memory.fill(b"\x01\x02", stream=stream)
    stream.sync()
    assert cuda.bytes_at(int(memory.handle), 8).tolist() == [1, 2] * 4


def test_fresh_memory_is_nan(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    assert np.isnan(cuda.bytes_at(int(memory.handle), SIZE).view(np.float32)).all()


def test_an_event_sync_runs_what_came_before_it_only(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    memory.fill(1, stream=stream)
    event = stream.record()
    memory.fill(2, stream=stream)
    event.sync()
    assert values_at(cuda, memory) == {1}


def test_an_event_is_done_when_asked_again(cuda: FakeCuda, stream: Any) -> None:
    device_memory(stream).fill(1, stream=stream)
    event = stream.record()
    assert [event.is_done, event.is_done] == [False, True]


# --- time


def timed(stream: Any) -> Any:
    return stream.record(options={"timing_enabled": True})


def test_events_that_are_not_done_have_no_distance(cuda: FakeCuda, stream: Any) -> None:
    first, last = timed(stream), timed(stream)
    with pytest.raises(RuntimeError, match="have not completed"):
        last - first


def test_events_of_a_capture_have_no_distance(cuda: FakeCuda, stream: Any) -> None:
    first, last = (core().Device(0).create_event({"timing_enabled": True}) for _ in range(2))

    def work() -> None:
        stream.record(first)
        stream.record(last)

    captured(stream, work).launch(stream)
    stream.sync()
    with pytest.raises(RuntimeError, match="must be recorded"):
        last - first
    with pytest.raises(CUDAError, match="CUDA_ERROR_CAPTURED_EVENT"):
        last.sync()


# --- threads and devices


@pytest.mark.parametrize("call", ["sync", "copy", "free", "pinned", "record"])
def test_every_thread_makes_the_device_current(call: str, cuda: FakeCuda, stream: Any) -> None:
    target, source = device_memory(stream), pinned_memory(1)
    calls = {
        "sync": stream.sync,
        "copy": lambda: target.copy_from(source, stream=stream),
        "free": target.close,
        "pinned": pinned_memory,
        "record": stream.record,
    }
    assert [type(error) for error in on_a_thread(calls[call])] == [RuleBroken]
    assert "current on this thread" in cuda.broken[0] or "no GPU is current" in cuda.broken[0]


def test_work_on_a_stream_needs_the_streams_device(cuda: FakeCuda, stream: Any) -> None:
    core().Device(1).set_current()
    with pytest.raises(RuleBroken, match="GPU 0 is not current"):
        stream.sync()


@pytest.mark.parametrize(("ordinal", "words"), [(2, r"within \[0, 2\), got 2"), (-1, "must be >= 0, got -1")])
def test_a_device_that_is_not_there_is_a_value_error(ordinal: int, words: str, cuda: FakeCuda) -> None:
    with pytest.raises(ValueError, match=words):
        core().Device(ordinal)


def test_without_a_driver_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, driver=None)
    with pytest.raises(RuntimeError, match='"cuda" is an NVIDIA driver library'):
        core().Device.get_all_devices()
    with pytest.raises(RuntimeError, match='"nvml" is an NVIDIA driver library'):
        core().system.get_kernel_mode_driver_version()


def test_without_gpus_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, devices=())
    with pytest.raises(CUDAError, match="CUDA_ERROR_NO_DEVICE"):
        core().Device(0)


def test_without_nvml_the_driver_tells_its_version_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, nvml=False)
    with pytest.raises(RuntimeError, match="nvml"):
        core().system.get_user_mode_driver_version()
    assert import_module("cuda.bindings.driver").cuDriverGetVersion() == (0, 13000)


def test_a_gpu_that_another_process_holds_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, devices=(FakeGpu(busy=True),))
    with pytest.raises(CUDAError, match="CUDA_ERROR_DEVICE_UNAVAILABLE"):
        core().Device(0).set_current()


def test_a_device_tells_what_it_is(cuda: FakeCuda) -> None:
    first, second = core().Device.get_all_devices()
    assert (first.name, second.name, second.device_id) == (FakeGpu().name, "other", 1)
    assert (second.compute_capability.major, second.compute_capability.minor, second.arch) == (8, 9, "89")
    assert core().system.get_kernel_mode_driver_version() == (580, 65, 6)


# --- memory


def test_a_copy_of_unequal_sizes_is_caught(cuda: FakeCuda, stream: Any) -> None:
    with pytest.raises(RuleBroken, match="sizes mismatch"):
        device_memory(stream, 8).copy_from(pinned_memory(1, 16), stream=stream)


def test_a_view_past_the_end_is_caught(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    view = core().Buffer.from_handle(int(memory.handle) + SIZE - 8, 16)
    with pytest.raises(RuleBroken, match="needs 16 bytes at byte 1016"):
        view.fill(0, stream=stream)


def test_memory_that_is_not_cudas_is_caught(cuda: FakeCuda, stream: Any) -> None:
    array = np.zeros(SIZE, np.uint8)
    view = core().Buffer.from_handle(array.ctypes.data, SIZE)
    with pytest.raises(RuleBroken, match="no memory of CUDA"):
        device_memory(stream).copy_from(view, stream=stream)


def test_a_view_of_closed_memory_is_caught(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    view = core().Buffer.from_handle(int(memory.handle), 8, owner=memory)
    memory.close()
    with pytest.raises(RuleBroken, match="was closed"):
        view.fill(0, stream=stream)


def test_a_closed_buffer_is_caught(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    memory.close()
    memory.close()
    with pytest.raises(RuleBroken, match="closed buffer"):
        memory.fill(0, stream=stream)


def test_pinned_memory_that_is_closed_under_a_copy_is_caught(cuda: FakeCuda, stream: Any) -> None:
    source = pinned_memory(1)
    device_memory(stream).copy_from(source, stream=stream)
    with pytest.raises(RuleBroken, match="closed while work that uses it is pending"):
        source.close()


def test_a_write_past_the_end_is_caught(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    ctypes.memset(int(memory.handle) + SIZE, 0, 1)
    memory.fill(0, stream=stream)
    with pytest.raises(RuleBroken, match="wrote outside"):
        stream.sync()


def test_a_write_before_the_begin_is_caught_when_the_memory_is_closed(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    ctypes.memset(int(memory.handle) - 1, 0, 1)
    with pytest.raises(RuleBroken, match="wrote outside"):
        memory.close()


def test_a_copy_within_itself_is_caught(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    parts = [core().Buffer.from_handle(int(memory.handle) + offset, 64) for offset in (0, 32)]
    with pytest.raises(RuleBroken, match="overlap"):
        parts[0].copy_from(parts[1], stream=stream)


def test_streams_that_share_memory_unordered_are_caught(cuda: FakeCuda, stream: Any) -> None:
    other = core().Device(0).create_stream()
    memory = device_memory(stream)
    stream.sync()
    memory.fill(1, stream=stream)
    with pytest.raises(RuleBroken, match="race"):
        memory.fill(2, stream=other)


def test_streams_that_share_memory_after_a_sync_are_not(cuda: FakeCuda, stream: Any) -> None:
    other = core().Device(0).create_stream()
    memory = device_memory(stream)
    memory.fill(1, stream=stream)
    stream.sync()
    memory.fill(2, stream=other)
    assert cuda.broken == []


def test_streams_that_only_read_one_memory_are_not(cuda: FakeCuda, stream: Any) -> None:
    other = core().Device(0).create_stream()
    memory, targets = device_memory(stream), [device_memory(each) for each in (stream, other)]
    memory.fill(1, stream=stream)
    stream.sync()
    for target, each in zip(targets, (stream, other), strict=True):
        target.copy_from(memory, stream=each)
    assert cuda.broken == []


def test_memory_is_there_only_after_the_stream_that_allocates_it(cuda: FakeCuda, stream: Any) -> None:
    with pytest.raises(RuleBroken, match="race"):
        device_memory(stream).fill(1, stream=core().Device(0).create_stream())


def test_memory_of_a_small_gpu_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda.install(monkeypatch, devices=(FakeGpu(memory_bytes=1000),))
    core().Device(0).set_current()
    stream = core().Device(0).create_stream()
    first = device_memory(stream, 600)
    with pytest.raises(CUDAError, match=r"^CUDA_ERROR_OUT_OF_MEMORY: "):
        device_memory(stream, 600)
    first.close()
    assert device_memory(stream, 600).size == cuda.allocated_bytes == 600


# --- captures


@pytest.fixture
def building(stream: Any) -> Iterator[Any]:
    """A builder that captures `stream`."""
    return stream.create_graph_builder().begin_building("thread_local")


@pytest.mark.parametrize("mode", ["global", "relaxed"])
def test_any_other_capture_mode_is_caught(mode: str, cuda: FakeCuda, stream: Any) -> None:
    with pytest.raises(RuleBroken, match="thread_local"):
        stream.create_graph_builder().begin_building(mode)


@pytest.mark.parametrize(
    "call", ["allocate", "pinned", "free", "sync", "event sync", "device sync", "query", "legacy", "stream sync"]
)
def test_what_a_capturing_thread_must_not_do(call: str, cuda: FakeCuda, stream: Any) -> None:
    device = core().Device(0)
    other = device.create_stream()
    memory, event = device_memory(other), other.record()
    builder = stream.create_graph_builder().begin_building("thread_local")
    calls: dict[str, Callable[[], Any]] = {
        "allocate": lambda: device_memory(other),
        "pinned": pinned_memory,
        "free": memory.close,
        "sync": other.sync,
        "event sync": event.sync,
        "device sync": device.sync,
        "query": lambda: event.is_done,
        "legacy": lambda: memory.fill(0, stream=device.default_stream),
        "stream sync": stream.sync,
    }
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        calls[call]()
    with pytest.raises(RuntimeError, match="has been invalidated"):
        builder.end_building()
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        builder.close()
    stream.sync()


def test_a_device_sync_on_any_thread_invalidates_a_capture(cuda: FakeCuda, stream: Any, building: Any) -> None:
    def work() -> None:
        core().Device(0).set_current()
        core().Device(0).sync()

    assert [type(error) for error in on_a_thread(work)] == [CUDAError]
    with pytest.raises(RuntimeError, match="has been invalidated"):
        building.end_building()


def test_another_threads_work_on_a_capturing_stream_is_caught(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    stream.create_graph_builder().begin_building("thread_local")

    def work() -> None:
        core().Device(0).set_current()
        memory.fill(0, stream=stream)

    assert [type(error) for error in on_a_thread(work)] == [RuleBroken]


def test_a_closed_builder_leaves_nothing_open(cuda: FakeCuda, stream: Any, building: Any) -> None:
    building.close()
    stream.sync()
    assert cuda.live() == [f"stream {int(stream.handle):#x}"]


def test_a_stream_that_captures_cannot_be_closed(cuda: FakeCuda, stream: Any, building: Any) -> None:
    with pytest.raises(RuleBroken, match="closed while it captures"):
        stream.close()


def test_a_graph_that_holds_freed_memory_is_caught(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    graph = captured(stream, lambda: memory.fill(0, stream=stream))
    memory.close()
    with pytest.raises(RuleBroken, match="a graph was launched that uses"):
        graph.launch(stream)


def test_a_graph_that_is_launched_twice_at_once_is_caught(cuda: FakeCuda, stream: Any) -> None:
    other = core().Device(0).create_stream()
    graph = captured(stream, lambda: None)
    graph.launch(stream)
    graph.launch(stream)
    with pytest.raises(RuleBroken, match="pending on another stream"):
        graph.launch(other)
    stream.sync()
    graph.launch(other)


def test_a_closed_graph_is_caught(cuda: FakeCuda, stream: Any) -> None:
    graph = captured(stream, lambda: None)
    graph.close()
    with pytest.raises(RuleBroken, match="closed graph"):
        graph.launch(stream)


# --- what tests read


def test_what_is_open_is_listed_until_it_is_closed(cuda: FakeCuda, stream: Any) -> None:
    things = [stream, device_memory(stream), pinned_memory(), stream.record(), captured(stream, lambda: None)]
    things.append(stream.create_graph_builder())
    core().Buffer.from_handle(int(things[1].handle), 8)
    assert [each.split(" ")[0] for each in cuda.live()] == ["buffer", "event", "graph", "graph", "pinned", "stream"]
    for thing in reversed(things):
        thing.close()
    assert cuda.live() == []


def test_what_a_block_does_is_counted(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    with cuda.during() as counted:
        memory.fill(0, stream=stream)
        pinned_memory()
        stream.sync()
    stream.sync()
    assert (counted.fills, counted.allocations, counted.syncs, counted.frees, counted.copies) == (1, 1, 1, 0, 0)


def test_the_work_of_a_stream_is_listed(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    memory.copy_from(pinned_memory(1), stream=stream)
    memory.fill(1, stream=stream)
    assert cuda.work[int(stream.handle)] == [("allocate", SIZE), ("copy", SIZE), ("fill", SIZE)]
    assert cuda.streams_used == {int(stream.handle)}


def test_what_is_captured_is_listed(cuda: FakeCuda, stream: Any) -> None:
    target, source = device_memory(stream), pinned_memory(1)
    captured(stream, lambda: target.copy_from(source, stream=stream))
    captured(stream, lambda: None)
    assert cuda.captured == [[("copy", SIZE)], []]


def test_a_broken_rule_is_remembered_when_someone_swallows_it(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    memory.close()
    with pytest.raises(RuleBroken):
        memory.fill(0, stream=stream)
    assert cuda.broken == ["a closed buffer was used"]


def test_threads_with_streams_of_their_own_break_no_rule_and_leave_nothing(cuda: FakeCuda) -> None:
    work_on_threads()
    assert (cuda.broken, cuda.live()) == ([], [])


# --- faults


def test_a_fault_comes_after_good_calls_and_goes(cuda: FakeCuda, stream: Any) -> None:
    cuda.fail("allocate", after=1)
    device_memory(stream)
    with pytest.raises(CUDAError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        device_memory(stream)
    device_memory(stream)


@pytest.mark.parametrize("call", ["copy", "fill", "launch", "sync", "begin_building", "complete", "create_stream"])
def test_each_call_can_fail(call: str, cuda: FakeCuda, stream: Any) -> None:
    target, source = device_memory(stream), pinned_memory(1)
    cuda.fail(call, "CUDA_ERROR_INVALID_VALUE")

    def everything() -> None:
        target.copy_from(source, stream=stream)
        target.fill(0, stream=stream)
        captured(stream, lambda: None).launch(stream)
        core().Device(0).create_stream()
        stream.sync()

    with pytest.raises(CUDAError, match="CUDA_ERROR_INVALID_VALUE"):
        everything()
    assert cuda.journal[-1][0] == call


@pytest.mark.parametrize("error", ["CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED"])
def test_a_sticky_error_stays(error: str, cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    cuda.fail("sync", error)
    for call in (stream.sync, stream.sync, core().Device(0).sync, lambda: device_memory(stream), pinned_memory):
        with pytest.raises(CUDAError, match=error):
            call()
    memory.close()
    stream.close()
    assert cuda.live() == []


# --- views


def view_of(buffer: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    return core().utils.StridedMemoryView.from_buffer(buffer, shape, dtype=np.dtype(dtype))


def test_an_array_of_the_host_has_a_view_too(cuda: FakeCuda) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    view = core().utils.StridedMemoryView.from_any_interface(array, -1)
    assert (view.ptr, view.shape, view.device_id, view.is_device_accessible) == (array.ctypes.data, (2, 3), -1, False)


def test_a_view_shows_the_memory_as_it_is(cuda: FakeCuda, stream: Any) -> None:
    memory = device_memory(stream)
    view = view_of(memory, (2, 128), np.float32)
    memory.fill(0, stream=stream)
    assert np.isnan(fake_cuda.array_of(view)).all()
    stream.sync()
    assert (fake_cuda.array_of(view) == 0).all()


# --- TensorRT


@pytest.fixture(scope="module")
def doubling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = 2 x, both (B, 4)."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> doubling (float[B, 4] x) => (float[B, 4] y) { y = Add(x, x) }'
    )
    path = tmp_path_factory.mktemp("doubling") / "doubling.onnx"
    onnx.save(model, path)
    return path


class Heard(list[str]):
    """The errors that a library told its logger."""


class Trt:
    """A library with one engine, one context and memory for it, ready to run on `stream`."""

    def __init__(self, cuda: FakeCuda, stream: Any, fake: FakeTensorRT, plan: Path, module: str) -> None:
        self.cuda, self.stream, self.fake, self.plan = cuda, stream, fake, plan
        self.module: Any = sys.modules[module]
        self.heard = Heard()
        self.runtime = self.module.Runtime(logger_of(self.module, self.heard))
        self.engine = self.load(plan)
        nbytes = int(np.prod(SHAPE)) * 4
        self.x, self.y, self.scratch = (device_memory(stream, size) for size in (nbytes, nbytes, SCRATCH_BYTES))
        self.context = self.ready_context()

    def load(self, plan: Path) -> Any:
        return self.runtime.deserialize_cuda_engine(plan.read_bytes())

    def bare_context(self, specialization: str = "EAGER") -> Any:
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        strategies = getattr(self.module, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:
            return self.engine.create_execution_context(strategy)
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = strategies[specialization]
        return self.engine.create_execution_context(config)

    def ready_context(self, specialization: str = "EAGER") -> Any:
        context = self.bare_context(specialization)
        assert context.set_input_shape("x", SHAPE)
        assert context.infer_shapes() == []
        context.set_device_memory(int(self.scratch.handle), self.scratch.size)
        assert context.set_tensor_address("x", int(self.x.handle))
        assert context.set_tensor_address("y", int(self.y.handle))
        return context

    def run(self, context: Any = None) -> bool:
        return (context or self.context).execute_async_v3(int(self.stream.handle))

    def set_x(self, value: float) -> None:
        self.x.fill(np.float32(value).tobytes(), stream=self.stream)

    @property
    def values(self) -> set[float]:
        return set(self.cuda.bytes_at(int(self.y.handle), self.y.size).view(np.float32).tolist())


def logger_of(module: Any, heard: list[str]) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity == module.ILogger.Severity.ERROR:
                heard.append(msg)

    return Logger()


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def trt(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    cuda: FakeCuda,
    stream: Any,
    doubling: Path,
    tmp_path: Path,
) -> Trt:
    fake = fake_tensorrt.install(monkeypatch, cuda, module=request.param)
    return Trt(cuda, stream, fake, plan_of(doubling, tmp_path / "doubling.engine"), request.param)


def plan_of(onnx_path: Path, path: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "profile": {"x": ((1, 4), (2, 4), (8, 4))},
        "scratch_bytes": SCRATCH_BYTES,
        "name": "doubling",
    }
    return fake_tensorrt.write_plan(path, onnx_path, **{**options, **changes})


def test_an_engine_runs_at_the_sync_on_its_addresses(trt: Trt) -> None:
    trt.set_x(3)
    assert trt.run()
    assert np.isnan(list(trt.values)).all()
    trt.stream.sync()
    assert trt.values == {6.0}
    assert trt.cuda.broken == []


def test_an_engine_tells_its_border(trt: Trt) -> None:
    engine, module = trt.engine, trt.module
    assert [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)] == ["x", "y"]
    assert [engine.get_tensor_mode(name) for name in "xy"] == [module.TensorIOMode.INPUT, module.TensorIOMode.OUTPUT]
    assert engine.get_tensor_dtype("x") is module.DataType.FLOAT
    assert engine.get_tensor_location("x") is module.TensorLocation.DEVICE
    assert tuple(engine.get_tensor_shape("y")) == (-1, 4)
    assert [tuple(shape) for shape in engine.get_tensor_profile_shape("x", 0)] == [(1, 4), (2, 4), (8, 4)]
    assert engine.device_memory_size_v2 == SCRATCH_BYTES


def test_a_plan_may_be_a_map_that_is_closed_afterwards(trt: Trt) -> None:
    with trt.plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert trt.runtime.deserialize_cuda_engine(mapped) is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"truncated": True}, "header.size"),
        ({"version": "10.12.0.36"}, "Version tag does not match"),
        ({"sm": "sm80"}, "incompatible device"),
    ],
)
def test_a_plan_for_something_else_is_none(
    changes: dict[str, Any], words: str, trt: Trt, doubling: Path, tmp_path: Path
) -> None:
    assert trt.load(plan_of(doubling, tmp_path / "other.engine", **changes)) is None
    assert words in trt.heard[0]
    assert "Engine deserialization failed" in trt.heard[1]


def test_any_other_file_is_none(trt: Trt, doubling: Path) -> None:
    assert trt.load(doubling) is None
    assert "magicTag" in trt.heard[0]


def test_weights_are_loaded_once_however_many_contexts_run(trt: Trt) -> None:
    others = [trt.ready_context() for _ in range(3)]
    assert (trt.fake.deserialized, trt.fake.sessions, trt.fake.contexts) == (["doubling"], 1, 4)
    assert trt.fake.live_contexts == 4
    del others
    gc.collect()
    assert trt.fake.live_contexts == 1


def test_scratch_that_is_missing_is_caught(trt: Trt) -> None:
    context = trt.bare_context()
    assert context.set_input_shape("x", SHAPE)
    context.infer_shapes()
    for name, memory in (("x", trt.x), ("y", trt.y)):
        context.set_tensor_address(name, int(memory.handle))
    with pytest.raises(RuleBroken, match="its scratch is 0 bytes"):
        trt.run(context)


@pytest.mark.parametrize(
    ("offset", "size", "words"),
    [(0, SCRATCH_BYTES - 1, "its scratch is 511 bytes"), (128, SCRATCH_BYTES, "not 256-byte aligned")],
)
def test_scratch_that_does_not_do_is_caught(offset: int, size: int, words: str, trt: Trt) -> None:
    trt.context.set_device_memory(int(trt.scratch.handle) + offset, size)
    with pytest.raises(RuleBroken, match=words):
        trt.run()


def test_scratch_that_was_freed_is_caught(trt: Trt) -> None:
    trt.scratch.close()
    with pytest.raises(RuleBroken, match=r"scratch: .* was closed"):
        trt.run()


def test_scratch_is_garbage_after_a_run(trt: Trt) -> None:
    trt.run()
    trt.stream.sync()
    assert values_at(trt.cuda, trt.scratch) == {fake_tensorrt.GARBAGE}


def test_scratch_of_two_runs_that_are_not_ordered_is_caught(trt: Trt) -> None:
    other = core().Device(0).create_stream()
    context = trt.ready_context()
    outputs = [device_memory(each, trt.y.size) for each in (trt.stream, other)]
    trt.stream.sync()
    other.sync()
    for each, output in zip((trt.context, context), outputs, strict=True):
        each.set_tensor_address("y", int(output.handle))
    assert trt.run()
    with pytest.raises(RuleBroken, match="race"):
        context.execute_async_v3(int(other.handle))


def test_one_context_on_two_streams_at_once_is_caught(trt: Trt) -> None:
    assert trt.run()
    with pytest.raises(RuleBroken, match="one context runs on two streams"):
        trt.context.execute_async_v3(int(core().Device(0).create_stream().handle))


def test_scratch_of_two_runs_on_one_stream_is_fine(trt: Trt) -> None:
    other = trt.ready_context()
    assert trt.run()
    assert trt.run(other)
    trt.stream.sync()
    assert trt.cuda.broken == []


def test_a_missing_shape_is_caught(trt: Trt) -> None:
    context = trt.bare_context()
    assert context.infer_shapes() == ["x"]
    with pytest.raises(RuleBroken, match="x have no shape"):
        trt.run(context)


@pytest.mark.parametrize("shape", [(9, 4), (2, 5), (2,)])
def test_a_shape_outside_the_profile_is_false(shape: tuple[int, ...], trt: Trt) -> None:
    assert trt.context.set_input_shape("x", shape) is False
    assert "satisfyProfile" in trt.heard[0]


def test_shapes_that_were_not_inferred_again_are_caught(trt: Trt) -> None:
    trt.context.set_input_shape("x", (1, 4))
    with pytest.raises(RuleBroken, match="infer_shapes was not asked"):
        trt.run()


def test_an_address_that_was_not_set_is_caught(trt: Trt) -> None:
    context = trt.bare_context()
    context.set_input_shape("x", SHAPE)
    context.infer_shapes()
    context.set_device_memory(int(trt.scratch.handle), SCRATCH_BYTES)
    with pytest.raises(RuleBroken, match="x has no address"):
        trt.run(context)


def test_an_address_that_is_not_aligned_is_caught(trt: Trt) -> None:
    trt.context.set_tensor_address("x", int(trt.scratch.handle) + 16)
    with pytest.raises(RuleBroken, match="not 256-byte aligned"):
        trt.run()


def test_memory_that_is_too_small_is_caught(trt: Trt) -> None:
    trt.context.set_input_shape("x", (8, 4))
    trt.context.infer_shapes()
    with pytest.raises(RuleBroken, match="x: needs 128 bytes"):
        trt.run()


def test_an_output_over_an_input_is_caught(trt: Trt) -> None:
    trt.context.set_tensor_address("y", int(trt.x.handle))
    with pytest.raises(RuleBroken, match="x and y overlap"):
        trt.run()


def test_an_output_over_the_scratch_is_caught(trt: Trt) -> None:
    trt.context.set_tensor_address("y", int(trt.scratch.handle))
    with pytest.raises(RuleBroken, match="y and scratch overlap"):
        trt.run()


@pytest.mark.parametrize("call", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_a_call_that_is_refused_is_false_and_told(call: str, trt: Trt) -> None:
    trt.fake.refuse(call)
    calls = {
        "set_input_shape": lambda: trt.context.set_input_shape("x", SHAPE),
        "set_tensor_address": lambda: trt.context.set_tensor_address("x", int(trt.x.handle)),
        "execute_async_v3": trt.run,
    }
    assert calls[call]() is False
    assert len(trt.heard) == 1
    assert calls[call]() is True


def test_a_context_that_is_refused_is_none(trt: Trt) -> None:
    trt.fake.refuse("create_execution_context", "doubling")
    assert trt.bare_context() is None
    assert len(trt.heard) == 1


def test_a_refusal_may_be_for_one_tensor(trt: Trt) -> None:
    trt.fake.refuse("set_tensor_address", "y")
    assert trt.context.set_tensor_address("x", int(trt.x.handle)) is True
    assert trt.context.set_tensor_address("y", int(trt.y.handle)) is False


def test_an_unknown_tensor_is_false(trt: Trt) -> None:
    assert trt.context.set_tensor_address("z", int(trt.x.handle)) is False
    assert trt.context.set_input_shape("y", SHAPE) is False


def test_a_run_can_be_captured_after_one_that_was_not(trt: Trt) -> None:
    trt.run()
    graph = captured(trt.stream, trt.run)
    for value in (1, 2):
        trt.set_x(value)
        graph.launch(trt.stream)
        trt.stream.sync()
        assert trt.values == {2.0 * value}


@pytest.mark.parametrize("first", [False, True], ids=["never run", "run with other shapes"])
def test_a_capture_without_a_run_before_is_invalid(first: bool, trt: Trt) -> None:
    if first:
        trt.run()
        trt.context.set_input_shape("x", (1, 4))
        trt.context.infer_shapes()
    builder = trt.stream.create_graph_builder().begin_building("thread_local")
    assert trt.run() is False
    assert "stream is capturing" in trt.heard[0]
    with pytest.raises(RuntimeError, match="has been invalidated"):
        builder.end_building()


def test_a_library_that_cannot_be_captured_says_so_on_rtx(trt: Trt) -> None:
    trt.run()
    trt.fake.uncapturable = True
    if trt.module.__name__ == "tensorrt_rtx":
        assert trt.context.is_stream_capturable(int(trt.stream.handle)) is False
    else:
        assert not hasattr(trt.context, "is_stream_capturable")
    builder = trt.stream.create_graph_builder().begin_building("thread_local")
    assert trt.run() is False
    with pytest.raises(RuntimeError, match="has been invalidated"):
        builder.end_building()


@pytest.mark.parametrize("trt", ["tensorrt_rtx"], indirect=True)
def test_a_capture_of_kernels_for_any_shape_is_caught(trt: Trt) -> None:
    context = trt.ready_context("LAZY")
    trt.run(context)
    with pytest.raises(RuleBroken, match="EAGER specialization"):
        captured(trt.stream, lambda: trt.run(context))


def test_a_captured_context_keeps_its_shapes_while_the_graph_is_open(trt: Trt) -> None:
    trt.run()
    graph = captured(trt.stream, trt.run)
    assert trt.context.set_input_shape("x", SHAPE)
    with pytest.raises(RuleBroken, match="the shape of x changes"):
        trt.context.set_input_shape("x", (1, 4))
    graph.close()
    assert trt.context.set_input_shape("x", (1, 4))


def test_a_captured_context_that_is_dropped_before_its_graph_is_caught(trt: Trt) -> None:
    trt.run()
    graph = captured(trt.stream, trt.run)
    trt.stream.sync()
    trt.context = None
    gc.collect()
    assert trt.cuda.broken == ["engine doubling: a context was dropped while an open graph holds its runs"]
    graph.close()


def test_a_context_that_is_dropped_before_its_run_is_caught(trt: Trt) -> None:
    trt.run()
    trt.context = None
    gc.collect()
    assert trt.cuda.broken == ["engine doubling: a context was dropped while its runs are pending"]


@pytest.mark.parametrize("call", ["deserialize", "create_execution_context", "execute"])
def test_an_error_of_cuda_is_told_in_the_librarys_words(call: str, trt: Trt) -> None:
    trt.cuda.fail(call)
    calls = {
        "deserialize": lambda: trt.load(trt.plan),
        "create_execution_context": trt.bare_context,
        "execute": trt.run,
    }
    assert not calls[call]()
    assert "OutOfMemory" in trt.heard[0]


def test_an_engine_that_is_loaded_where_no_gpu_is_current_is_caught(trt: Trt) -> None:
    assert [type(error) for error in on_a_thread(lambda: trt.load(trt.plan))] == [RuleBroken]


def test_a_logger_must_be_constructed(trt: Trt) -> None:
    class Careless(trt.module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match=r"ILogger.__init__"):
        trt.module.Runtime(Careless())


def test_the_librarys_words_are_kept(trt: Trt) -> None:
    assert trt.fake.said[0] == (Severity.INFO, "Loaded engine size: 0 MiB")


# --- ONNX Runtime


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> fake_onnxruntime.FakeOnnxRuntime:
    return fake_onnxruntime.install(monkeypatch, cuda)


def session_of(path: Path, stream: Any, **changes: Any) -> Any:
    options = {"device_id": "0", "user_compute_stream": str(int(stream.handle)), **changes}
    return onnxruntime.InferenceSession(path, providers=[(fake_onnxruntime.CUDA, options), fake_onnxruntime.CPU])


def binding_of(session: Any, x: Any, y: Any) -> Any:
    binding = session.io_binding()
    binding.bind_input("x", "cuda", 0, np.float32, SHAPE, int(x.handle))
    binding.bind_output("y", "cuda", 0, np.float32, SHAPE, int(y.handle))
    return binding


def without_sync() -> Any:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def test_a_session_on_the_gpu_runs_at_the_sync(
    on_gpu: fake_onnxruntime.FakeOnnxRuntime, cuda: FakeCuda, stream: Any, doubling: Path
) -> None:
    x, y = device_memory(stream, 32), device_memory(stream, 32)
    x.fill(np.float32(3).tobytes(), stream=stream)
    session = session_of(doubling, stream)
    with cuda.during() as counted:
        session.run_with_iobinding(binding_of(session, x, y), without_sync())
    assert counted.syncs == 0
    assert values_at(cuda, y) == {fake_cuda.UNWRITTEN}
    stream.sync()
    assert set(cuda.bytes_at(int(y.handle), 32).view(np.float32).tolist()) == {6.0}
    assert (session.get_providers()[0], [each.name for each in session.get_inputs()]) == (fake_onnxruntime.CUDA, ["x"])


def test_a_session_on_the_gpu_waits_unless_told_not_to(
    on_gpu: fake_onnxruntime.FakeOnnxRuntime, cuda: FakeCuda, stream: Any, doubling: Path
) -> None:
    x, y = device_memory(stream, 32), device_memory(stream, 32)
    session = session_of(doubling, stream)
    with cuda.during() as counted:
        session.run_with_iobinding(binding_of(session, x, y))
    assert (counted.syncs, cuda.pending()) == (1, 0)


def test_a_session_on_the_gpu_cannot_be_captured(
    on_gpu: fake_onnxruntime.FakeOnnxRuntime, stream: Any, doubling: Path
) -> None:
    x, y = device_memory(stream, 32), device_memory(stream, 32)
    session = session_of(doubling, stream)
    binding = binding_of(session, x, y)
    stream.create_graph_builder().begin_building("thread_local")
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        session.run_with_iobinding(binding, without_sync())


def test_a_session_is_bound_to_memory_that_is_there(
    on_gpu: fake_onnxruntime.FakeOnnxRuntime, stream: Any, doubling: Path
) -> None:
    x, y = device_memory(stream, 32), device_memory(stream, 16)
    session = session_of(doubling, stream)
    with pytest.raises(RuleBroken, match="y: needs 32 bytes"):
        session.run_with_iobinding(binding_of(session, x, y))


def test_a_session_is_bound_on_its_device(
    on_gpu: fake_onnxruntime.FakeOnnxRuntime, stream: Any, doubling: Path
) -> None:
    binding = session_of(doubling, stream).io_binding()
    with pytest.raises(RuleBroken, match="bound on cuda:1"):
        binding.bind_input("x", "cuda", 1, np.float32, SHAPE, int(device_memory(stream).handle))


def test_a_session_that_is_not_bound_whole_is_caught(
    on_gpu: fake_onnxruntime.FakeOnnxRuntime, stream: Any, doubling: Path
) -> None:
    session = session_of(doubling, stream)
    with pytest.raises(RuleBroken, match="x are not bound"):
        session.run_with_iobinding(session.io_binding())


def test_a_stream_of_another_gpu_is_caught(
    on_gpu: fake_onnxruntime.FakeOnnxRuntime, stream: Any, doubling: Path
) -> None:
    with pytest.raises(RuleBroken, match="another GPU"):
        session_of(doubling, stream, device_id=1)


def test_a_session_on_the_cpu_is_the_real_one(on_gpu: fake_onnxruntime.FakeOnnxRuntime, doubling: Path) -> None:
    session = onnxruntime.InferenceSession(doubling, providers=[fake_onnxruntime.CPU])
    (y,) = session.run(None, {"x": np.ones(SHAPE, np.float32)})
    assert (y == 2).all()


def test_a_load_can_fail(on_gpu: fake_onnxruntime.FakeOnnxRuntime, stream: Any, doubling: Path) -> None:
    on_gpu.fail_load("no kernel for Made.Up")
    with pytest.raises(Fail, match="no kernel for Made"):
        session_of(doubling, stream)
    session_of(doubling, stream)


def test_a_provider_that_cannot_start_leaves_the_cpu(
    on_gpu: fake_onnxruntime.FakeOnnxRuntime, stream: Any, doubling: Path
) -> None:
    on_gpu.cannot_start()
    assert session_of(doubling, stream).get_providers() == [fake_onnxruntime.CPU]


def test_the_cpus_wheel_has_no_cuda(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    fake_onnxruntime.install(monkeypatch, cuda, provider=False)
    assert onnxruntime.get_available_providers() == [fake_onnxruntime.CPU]
