"""Latents that stay on the GPU: their memory lives until everybody who shares it is done. The GPU is a stand-in."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import fake_cuda
import numpy as np
import pytest
from fake_gpu import Op

from ilf_trt.errors import InvalidRequest
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.gpu.array import DeviceArray
from ilf_trt.runtime.gpu.cuda import Gpu, Stream
from tests.runtime.conftest import Compiled, Machine
from tests.runtime.gpu.test_device import DEVICE, conditions

SHAPE = (2, 4, 8, 8)


class Consumer:
    """Another library that reads the latents on a stream of its own."""

    def __init__(self, gpu: Gpu) -> None:
        self.stream = gpu.stream()
        self.read: list[float] = []

    def take(self, machine: Machine, array: Any) -> object:
        """The capsule that it keeps; the read waits on its stream."""
        capsule = array.__dlpack__(stream=self.stream.handle)
        address, size_bytes = sys.modules["fake_dlpack"].layout_of(capsule).address, int(np.prod(array.shape)) * 4
        span = machine.cuda.span(address, size_bytes, "the consumer")

        def read() -> None:
            data = span.allocation.bytes[span.low : span.high].view(np.float32)
            self.read.append(float(data.sum()))

        machine.cuda.enqueue(machine.cuda.stream(self.stream.handle), Op(("read", size_bytes), read, reads=[span]))
        return capsule

    def close(self) -> None:
        self.stream.sync()
        self.stream.close()


@pytest.fixture
def gpu(machine: Machine) -> Gpu:
    return Gpu.open(0)


@pytest.fixture
def stream(gpu: Gpu) -> Iterator[Stream]:
    made = gpu.stream()
    yield made
    made.sync()
    made.close()


def ones(gpu: Gpu, stream: Stream) -> DeviceArray:
    """Complete latents, each number 1."""
    size_bytes = int(np.prod(SHAPE)) * 4
    memory, pinned = gpu.allocate(size_bytes, stream), gpu.pinned(size_bytes)
    pinned.host_bytes().view(np.float32)[:] = 1
    stream.copy(memory, pinned)
    stream.sync()
    pinned.close()
    return DeviceArray(memory, SHAPE, gpu)


@pytest.mark.parametrize("consumers", [1, 2, 3])
@pytest.mark.parametrize("explicit", [True, False])
def test_memory_is_not_used_again_before_every_consumer_has_read(
    explicit: bool, consumers: int, gpu: Gpu, stream: Stream, machine: Machine
) -> None:
    array = ones(gpu, stream)
    readers = [Consumer(gpu) for _ in range(consumers)]
    capsules = [reader.take(machine, array) for reader in readers]
    for capsule in capsules:
        sys.modules["fake_dlpack"].release(capsule)
    if explicit:
        array.close()
    del array
    gc.collect()
    assert machine.cuda.broken == []
    for reader in readers:
        reader.close()
        assert reader.read == [float(np.prod(SHAPE))]


def test_a_consumer_keeps_the_memory_that_the_array_forgot(gpu: Gpu, stream: Stream, machine: Machine) -> None:
    array = ones(gpu, stream)
    reader = Consumer(gpu)
    capsule = reader.take(machine, array)
    del array
    gc.collect()
    reader.stream.sync()
    assert reader.read == [float(np.prod(SHAPE))]
    assert any("buffer" in each for each in machine.cuda.live())
    sys.modules["fake_dlpack"].release(capsule)
    reader.close()
    assert not any("buffer" in each for each in machine.cuda.live())


def test_an_array_that_is_closed_twice_or_that_nobody_took_is_freed_once(
    gpu: Gpu, stream: Stream, machine: Machine
) -> None:
    array = ones(gpu, stream)
    with machine.cuda.during() as counted:
        array.close()
        array.close()
        del array
    assert counted.frees == 1


def test_an_array_that_is_closed_lends_its_memory_no_more(gpu: Gpu, stream: Stream, machine: Machine) -> None:
    array = ones(gpu, stream)
    reader = Consumer(gpu)
    array.close()
    for handle in (None, -1, reader.stream.handle):
        with pytest.raises(InvalidRequest, match=r"^these latents are closed .*; share them before close\(\)$"):
            array.__dlpack__(stream=handle)
    reader.close()


@pytest.mark.parametrize("handle", [None, -1, 0, 1, 2])
def test_streams_without_a_handle_of_their_own_are_understood(
    handle: int | None, gpu: Gpu, stream: Stream, machine: Machine
) -> None:
    array = ones(gpu, stream)
    capsule = array.__dlpack__(stream=handle)
    assert fake_cuda.array_of(array).sum() == np.prod(SHAPE)
    sys.modules["fake_dlpack"].release(capsule)
    array.close()


def test_an_array_outlives_its_pipeline_and_may_be_dropped_by_any_thread(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        kept = [pipeline.generate(**conditions(pipeline, 2), on_device=True).latents]
        wanted = pipeline.generate(**conditions(pipeline, 2)).latents
    assert np.allclose(fake_cuda.array_of(kept[0]), wanted)
    dropping = Thread(target=kept.clear)
    dropping.start()
    dropping.join()
    gc.collect()
    assert machine.cuda.live() == []
