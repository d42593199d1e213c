"""A GPU in host memory for dry runs: the stand-ins of tests/runtime/fakes, and torch's way to their streams.

Work on a stand-in waits until the host waits for it, and runs in stream order, as on a GPU. A dry run so goes through
all of the runtime's code for a GPU but the driver.
"""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from math import prod
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.record import ROOT
from benchmarks.rivals.torch_engine import Block, CudaLane, Lane, Work
from benchmarks.speed.machine import Machine
from benchmarks.speed.smoke_ground import NotTried
from ilf_trt.contract.target import Library
from ilf_trt.runtime.gpu.array import DeviceArray
from ilf_trt.runtime.gpu.cuda import Gpu, Stream, upload

FAKES = ROOT / "tests" / "runtime" / "fakes"
TIMES_FULL = 2  # a session frees what it keeps and asks again


class StandInLane:
    """torch on the CPU, on the streams of a stand-in."""

    device = "cpu"

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._op = import_module("fake_gpu").Op
        self._warm: set[int] = set()

    def tensor(self, address: int, shape: tuple[int, ...], dtype: str) -> Tensor:
        kind = getattr(torch, dtype)
        size_bytes = prod(shape) * kind.itemsize
        self._cuda.span(address, size_bytes, "torch")
        return torch.frombuffer((ctypes.c_uint8 * size_bytes).from_address(address), dtype=kind).view(shape)

    def enter(self, stream: Stream) -> None:
        self._cuda.stream(stream.handle)

    def put(self, stream: Stream, work: Work) -> None:
        cuda = self._cuda
        with cuda.lock:
            state = cuda.stream(stream.handle)
            cuda.enter("execute", state.device, note=(work.name,))
            reads, writes = self._spans(work.reads, work), self._spans(work.writes, work)
            if state.capture is None:
                self._warm.add(id(work))
            elif id(work) not in self._warm:
                cuda.invalidate(state.capture)  # cuBLAS would make its handle now
            cuda.enqueue(state, self._op(("engine", work.name), work.run, reads, writes, owner=work.owner))
            cuda.counts["engine_runs"] += 1

    def leave(self, stream: Stream, owner: object) -> None:
        if self._cuda.owns_captured_work(owner):
            self._cuda.break_rule("a context was closed while an open graph holds its runs")
        if self._cuda.owns_pending_work(owner):
            self._cuda.break_rule("a context was closed while its runs are pending")

    def _spans(self, blocks: Sequence[Block], work: Work) -> list[Any]:
        return [self._cuda.span(address, size_bytes, work.name) for address, size_bytes in blocks]


class StandInGround:
    """A check's ground on stand-ins."""

    builds = False

    def __init__(self, cuda: Any, work: Path) -> None:
        self.gpus = len(cuda.devices)
        self.work = work
        self.bundles: dict[Library | None, Path] = {}
        self._cuda = cuda

    def lane(self, ordinal: int = 0) -> Lane:
        return StandInLane(self._cuda)

    def latents_on_gpu(self, array: NDArray[np.float32], gpu: Gpu, stream: Stream) -> Any:
        memory = gpu.allocate(array.nbytes, stream)
        upload(gpu, stream, memory, array)
        return DeviceArray(memory, array.shape, gpu)

    def latents_from_gpu(self, latents: Any) -> NDArray[np.float32]:
        return np.asarray(import_module("fake_cuda").array_of(latents))

    def churn(self, gpu: Gpu, stream: Stream, stop: Event) -> int:
        rounds = 0
        gpu.use()
        while not stop.is_set():
            gpu.allocate(1 << (4 + rounds % 8), stream).close()
            gpu.pinned(16).close()
            stream.sync()
            rounds += 1
        return rounds

    @contextmanager
    def full(self, gpu: Gpu, stream: Stream) -> Iterator[None]:
        self._cuda.fail("allocate", times=TIMES_FULL)
        yield

    def spin(self, stream: Stream) -> None:
        raise NotTried("a stand-in has no clock of its own")

    def lose(self, stream: Stream) -> None:
        self._cuda.fail("sync", "CUDA_ERROR_ASSERT")

    def empty_cache(self) -> None:
        """Do nothing: torch keeps nothing on the CPU."""


@contextmanager
def stand_in_ground(work: Path) -> Iterator[StandInGround]:
    """Two stand-ins; see `stand_in_gpu`."""
    with stand_in_gpu(2) as cuda:
        yield StandInGround(cuda, work)


@contextmanager
def lane_of(machine: Machine) -> Iterator[Lane]:
    """torch's way to the GPU of `machine`, or in a dry run to a stand-in that is in its place for the block."""
    if not machine.dry_run:
        yield CudaLane()
        return
    with stand_in_gpu() as cuda:
        yield StandInLane(cuda)


@contextmanager
def stand_in_gpu(gpus: int = 1) -> Iterator[Any]:
    """A machine with stand-ins in the place of cuda.core; yields their controller.

    At the end it raises AssertionError if a rule of CUDA was broken, or if anything is still open on a GPU that works.
    """
    if str(FAKES) not in sys.path:
        sys.path.append(str(FAKES))
    import pytest

    fake = import_module("fake_cuda")
    with pytest.MonkeyPatch.context() as patch:
        cuda = fake.install(patch, devices=[fake.FakeGpu()] * gpus)
        yield cuda
        left = [*cuda.broken, *([] if cuda.lost else cuda.live())]
        if left:
            raise AssertionError(f"the dry run broke a rule or left something open: {'; '.join(left)}")
