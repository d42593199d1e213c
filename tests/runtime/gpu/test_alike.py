"""What the stand-ins and CUDA itself show alike; on a machine with a GPU, `-k real` runs it on the real CUDA."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

import fake_cuda
import numpy as np
import pytest

from ilf_trt.errors import DeviceError, OutOfMemory
from ilf_trt.runtime.gpu.cuda import ALIGNMENT, Gpu, upload
from tests.runtime.gpu.cuda_work import (
    SIZE,
    captured,
    core,
    device_memory,
    host_view,
    new_stream,
    pinned_memory,
    work_on_threads,
)

TOO_MUCH_BYTES = 1 << 44


def has_gpu() -> bool:
    """Whether this machine has a driver and a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


@pytest.fixture(params=["fake", "real"] if has_gpu() else ["fake"], autouse=True)
def _cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, current on this thread."""
    if request.param == "fake":
        fake_cuda.install(monkeypatch)
    core().Device(0).set_current()


@pytest.fixture
def stream(_cuda: None) -> Any:
    return new_stream()


@pytest.fixture
def building(stream: Any) -> Iterator[Any]:
    """A builder that captures `stream`."""
    builder = stream.create_graph_builder().begin_building("thread_local")
    yield builder
    with suppress(Exception):  # an invalid capture
        builder.close()


def cuda_error() -> type[Exception]:
    return import_module("cuda.core._utils.cuda_utils").CUDAError


def values_in(buffer: Any) -> list[int]:
    """The different bytes in memory of a GPU; whoever wrote it is done."""
    target, stream = pinned_memory(size=buffer.size), new_stream()
    target.copy_from(buffer, stream=stream)
    stream.sync()
    return sorted(set(host_view(target).tolist()))


def on_a_thread(work: Callable[[], Any]) -> list[str]:
    """What `work` raised on a thread of its own."""
    raised: list[str] = []

    def run() -> None:
        try:
            work()
        except (Exception, AssertionError) as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised


def timed() -> Any:
    return core().Device(0).create_event({"timing_enabled": True})


# --- memory and order


@pytest.mark.parametrize("size", [1, 100, 4096, (1 << 20) + 1])
def test_addresses_are_aligned(size: int, stream: Any) -> None:
    blocks = [device_memory(stream, size) for _ in range(3)]
    assert [int(block.handle) % ALIGNMENT for block in blocks] == [0, 0, 0]


def test_a_copy_and_a_fill_run_in_the_order_of_the_stream(stream: Any) -> None:
    memory, target = device_memory(stream), pinned_memory()
    memory.copy_from(pinned_memory(7), stream=stream)
    target.copy_from(memory, stream=stream)
    memory.fill(b"\x01\x02", stream=stream)
    stream.sync()
    assert set(host_view(target).tolist()) == {7}
    assert values_in(memory) == [1, 2]


def test_a_part_of_memory_is_copied_like_an_allocation(stream: Any) -> None:
    memory = device_memory(stream)
    memory.fill(0, stream=stream)
    part = core().Buffer.from_handle(int(memory.handle) + 256, 512, owner=memory)
    part.copy_from(pinned_memory(3, 512), stream=stream)
    target = pinned_memory()
    target.copy_from(memory, stream=stream)
    stream.sync()
    assert host_view(target).tolist() == [0] * 256 + [3] * 512 + [0] * 256


def test_an_event_makes_another_stream_wait(stream: Any) -> None:
    other = new_stream()
    first, second = device_memory(stream), device_memory(other)
    first.copy_from(pinned_memory(7), stream=stream)
    other.wait(stream.record())
    second.copy_from(first, stream=other)
    other.sync()
    assert values_in(second) == [7]


def test_a_stream_waits_for_a_stream(stream: Any) -> None:
    other = new_stream()
    first, second = device_memory(stream), device_memory(other)
    first.copy_from(pinned_memory(7), stream=stream)
    other.wait(stream)
    second.copy_from(first, stream=other)
    other.sync()
    assert values_in(second) == [7]


def test_a_device_sync_runs_all_streams(stream: Any) -> None:
    streams = (stream, new_stream())
    memories = [device_memory(each) for each in streams]
    for memory, each in zip(memories, streams, strict=True):
        memory.fill(3, stream=each)
    core().Device(0).sync()
    assert [values_in(memory) for memory in memories] == [[3], [3]]


def test_a_stream_is_known_by_its_handle(stream: Any) -> None:
    memory = device_memory(stream)
    memory.fill(1, stream=core().Stream.from_handle(int(stream.handle)))
    stream.sync()
    assert values_in(memory) == [1]


def test_memory_is_freed_in_stream_order(stream: Any) -> None:
    source, target = device_memory(stream), pinned_memory()
    source.fill(5, stream=stream)
    target.copy_from(source, stream=stream)
    source.close()
    stream.sync()
    assert set(host_view(target).tolist()) == {5}


def test_memory_beyond_the_gpus_is_out_of_memory(stream: Any) -> None:
    with pytest.raises(cuda_error(), match=r"^CUDA_ERROR_OUT_OF_MEMORY: "):
        device_memory(stream, TOO_MUCH_BYTES)
    memory = device_memory(stream)
    memory.fill(1, stream=stream)
    stream.sync()
    assert values_in(memory) == [1]


# --- time


def test_the_distance_of_two_events_is_a_time(stream: Any) -> None:
    first, last = timed(), timed()
    stream.record(first)
    stream.record(last)
    stream.sync()
    assert last - first >= 0


def test_events_without_timing_have_no_distance(stream: Any) -> None:
    first, last = stream.record(), stream.record()
    stream.sync()
    with pytest.raises(RuntimeError, match="created with timing enabled"):
        last - first


def test_events_that_were_never_recorded_have_no_distance() -> None:
    first, last = timed(), timed()
    with pytest.raises(RuntimeError, match="must be recorded"):
        last - first


# --- threads


def test_a_device_that_is_not_current_cannot_be_used() -> None:
    (error,) = on_a_thread(new_stream)
    assert "set_current" in error


def test_threads_with_streams_of_their_own_do_not_disturb_one_another() -> None:
    work_on_threads()


# --- captures


def test_captured_work_runs_at_each_launch_only(stream: Any) -> None:
    target, source = device_memory(stream), pinned_memory(1)
    target.fill(9, stream=stream)
    graph = captured(stream, lambda: target.copy_from(source, stream=stream))
    stream.sync()
    assert values_in(target) == [9]
    for value in (2, 3):
        host_view(source)[:] = value
        graph.launch(stream)
        stream.sync()
        assert values_in(target) == [value]


@pytest.mark.parametrize("call", ["pinned", "device sync", "stream sync"])
def test_what_a_capturing_thread_must_not_do_makes_the_capture_invalid(call: str, stream: Any, building: Any) -> None:
    calls = {"pinned": pinned_memory, "device sync": core().Device(0).sync, "stream sync": stream.sync}
    with pytest.raises(cuda_error(), match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        calls[call]()
    with pytest.raises(RuntimeError, match="has been invalidated"):
        building.end_building()
    with suppress(cuda_error()):
        building.close()
    stream.sync()


def test_work_on_another_stream_is_not_captured(stream: Any) -> None:
    other = new_stream()
    memory = device_memory(other)
    graph = captured(stream, lambda: memory.fill(4, stream=other))
    other.sync()
    assert values_in(memory) == [4]
    graph.close()


def test_other_threads_go_on_during_a_capture(building: Any) -> None:
    def work() -> None:
        core().Device(0).set_current()
        other = new_stream()
        memory = device_memory(other)
        memory.fill(0, stream=other)
        pinned_memory().close()
        other.sync()

    assert on_a_thread(work) == []
    building.end_building()


def test_a_capture_ends_on_its_thread(building: Any) -> None:
    def work() -> None:
        core().Device(0).set_current()
        building.end_building()

    (error,) = on_a_thread(work)
    assert "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD" in error


def test_a_capture_cannot_wait_for_work_outside(stream: Any) -> None:
    event = new_stream().record()
    builder = stream.create_graph_builder().begin_building("thread_local")
    with pytest.raises(cuda_error(), match="CUDA_ERROR_STREAM_CAPTURE_ISOLATION"):
        stream.wait(event)
    with suppress(Exception):
        builder.close()


def test_closing_a_builder_ends_its_capture(stream: Any, building: Any) -> None:
    building.close()
    stream.sync()


def test_a_builder_has_its_states(stream: Any) -> None:
    builder = stream.create_graph_builder()
    with pytest.raises(RuntimeError, match="not finished building"):
        builder.complete()
    with pytest.raises(RuntimeError, match="not building"):
        builder.end_building()
    assert builder.begin_building("thread_local").is_building
    with pytest.raises(RuntimeError, match="already building"):
        builder.begin_building("thread_local")
    builder.end_building()
    with pytest.raises(RuntimeError, match="Cannot resume"):
        builder.begin_building("thread_local")


# --- views


def view_of(buffer: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    return import_module("cuda.core.utils").StridedMemoryView.from_buffer(buffer, shape, dtype=np.dtype(dtype))


def test_a_view_claims_to_be_on_the_gpu(stream: Any) -> None:
    view = view_of(device_memory(stream), (16, 16), np.float32)
    assert (view.__dlpack_device__(), view.device_id, view.is_device_accessible) == ((2, 0), 0, True)
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(view)


def test_a_view_travels_through_dlpack(stream: Any) -> None:
    memory = device_memory(stream)
    view = view_of(memory, (16, 16), np.float32)
    again = import_module("cuda.core.utils").StridedMemoryView.from_any_interface(view, -1)
    assert (again.ptr, again.shape, again.dtype) == (int(memory.handle), (16, 16), np.float32)
    assert again.__dlpack_device__() == (2, 0)


def test_a_view_larger_than_its_buffer_is_refused(stream: Any) -> None:
    with pytest.raises(ValueError, match="too small for the layout"):
        view_of(device_memory(stream), (16, 17), np.float32)


# --- the runtime's own classes


def test_a_capture_of_the_runtime_runs_at_each_launch_and_frees_what_it_had() -> None:
    gpu = Gpu.open(0)
    stream, pinned = gpu.stream(), gpu.pinned(SIZE)
    memory = gpu.allocate(SIZE, stream)
    upload(gpu, stream, memory, np.full(SIZE, 5, np.uint8))

    def enqueue() -> None:
        stream.copy(pinned, memory)
        stream.zero(memory.part(0, 256))

    graph = stream.capture(enqueue)
    stream.sync()
    assert not pinned.host_bytes().any()
    for first in (5, 0):
        graph.launch()
        stream.sync()
        assert pinned.host_bytes().tolist() == [first] * 256 + [5] * (SIZE - 256)
    graph.close()
    for each in (memory, pinned, stream):
        each.close()
    gpu.trim()


def test_a_refused_capture_leaves_the_stream_of_the_runtime_usable() -> None:
    gpu = Gpu.open(0)
    stream = gpu.stream()
    memory = gpu.allocate(SIZE, stream)
    with pytest.raises(DeviceError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        stream.capture(stream.sync)
    stream.zero(memory)
    stream.sync()
    assert values_in(memory.core) == [0]


def test_full_memory_is_told_by_the_runtime() -> None:
    gpu = Gpu.open(0)
    with pytest.raises(OutOfMemory, match="16777216 MiB of GPU memory could not be allocated"):
        gpu.allocate(TOO_MUCH_BYTES, gpu.stream())
