"""Captures that something disturbs: they are tried again, now and later. The GPU is a stand-in."""

import gc
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.gpu import collection, trajectory
from ilf_trt.runtime.gpu.collection import no_collection
from ilf_trt.runtime.gpu.cuda import Gpu, Memory
from tests.runtime.conftest import Compiled, Machine
from tests.runtime.gpu.test_device import DEVICE, close_to, conditions, on_cpu

WARNING = "could not be captured"


class Clock:
    """Seconds that pass as a test wants."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(trajectory, "monotonic", made)
    return made


class Forgotten:
    """Pinned memory in a cycle: only the collector frees it."""

    def __init__(self, memory: Memory) -> None:
        self.itself = self
        self.memory = memory

    def __del__(self) -> None:
        self.memory.close()


@pytest.fixture
def forgotten_during_a_capture(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Memory]]:
    """What lies in the list is garbage from the first moment of a capture, and Python collects whenever it can."""
    held: list[Memory] = []
    begin = machine.cuda.begin_capture

    def begin_and_forget(*args: Any) -> Any:
        capture = begin(*args)
        while held:
            Forgotten(held.pop())
        return capture

    monkeypatch.setattr(machine.cuda, "begin_capture", begin_and_forget)
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    yield held
    gc.set_threshold(*threshold)
    gc.collect()


def test_a_collection_frees_nothing_into_a_capture(
    dit_bundle: Path,
    machine: Machine,
    compiled: Compiled,
    caplog: pytest.LogCaptureFixture,
    forgotten_during_a_capture: list[Memory],
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        forgotten_during_a_capture += [Gpu.open(0).pinned(64) for _ in range(3)]
        pipeline.generate(**conditions(pipeline, 2))
        assert forgotten_during_a_capture == []
        assert gc.isenabled()
        assert machine.cuda.captures == 1
        assert pipeline.generate(**conditions(pipeline, 2)).timings.captured
    assert WARNING not in caplog.text


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was_after_blocks_that_overlap(enabled: bool) -> None:
    both, done = Barrier(2), Barrier(2)

    def hold(leaves_first: bool) -> bool:
        with no_collection():
            both.wait()
            if leaves_first:
                inside = gc.isenabled()
            else:
                done.wait()
                inside = gc.isenabled()
        if leaves_first:
            done.wait()
        return inside

    (gc.enable if enabled else gc.disable)()
    try:
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(hold, [True, False])) == [False, False]
        assert gc.isenabled() == enabled
        with pytest.raises(ZeroDivisionError), no_collection():
            raise ZeroDivisionError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("where", ["after the lock", "after gc.disable()"])
def test_an_interrupt_as_a_block_begins_leaves_the_collector_as_it_was(
    where: str, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupts = [KeyboardInterrupt]

    class Interrupted:
        """The lock, left by an interrupt the first time."""

        def __enter__(self) -> None:
            pass

        def __exit__(self, *raised: object) -> None:
            if interrupts:
                raise interrupts.pop()

    def disable() -> None:
        gc.disable()
        raise interrupts.pop()

    (gc.enable if enabled else gc.disable)()
    try:
        with monkeypatch.context() as changed:
            if where == "after the lock":
                changed.setattr(collection, "_lock", Interrupted())
            else:
                changed.setattr(collection, "gc", SimpleNamespace(**vars(gc) | {"disable": disable}))
            with pytest.raises(KeyboardInterrupt), no_collection():
                pytest.fail("the block ran")
        assert gc.isenabled() == enabled
        with no_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


@pytest.mark.parametrize("call", ["begin_building", "end_building", "complete"])
def test_a_capture_that_cuda_refuses_once_is_tried_again_at_once(
    call: str, dit_bundle: Path, machine: Machine, compiled: Compiled, caplog: pytest.LogCaptureFixture
) -> None:
    machine.cuda.fail(call, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        pipeline.generate(**conditions(pipeline, 2))
        assert pipeline.generate(**conditions(pipeline, 2)).timings.captured
    assert WARNING not in caplog.text


@pytest.mark.parametrize("call", ["begin_building", "complete"])
def test_a_capture_that_cuda_refuses_twice_is_a_warning_and_is_tried_again_after_a_minute(
    call: str,
    dit_bundle: Path,
    machine: Machine,
    compiled: Compiled,
    caplog: pytest.LogCaptureFixture,
    clock: Clock,
) -> None:
    wanted = on_cpu(dit_bundle, 2)
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline, caplog.at_level(logging.WARNING):
        machine.cuda.fail(call, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", times=4)
        captured = []
        for wait_s in (0, 1, 60, 1, 60, 0):
            clock.now_s += wait_s
            result = pipeline.generate(**conditions(pipeline, 2))
            assert close_to(result.latents, wanted)
            captured.append(result.timings.captured)
        assert captured == [False, False, False, False, False, True]
    (record,) = [record for record in caplog.records if WARNING in record.message]
    assert "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" in record.message


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_where_the_library_cannot_be_captured_the_runs_are_enqueued_and_one_warning_says_why(
    target: str,
    dit_bundle: Path,
    machine: Machine,
    compiled: Compiled,
    caplog: pytest.LogCaptureFixture,
    clock: Clock,
) -> None:
    machine.libraries[target].uncapturable = True
    wanted = on_cpu(dit_bundle, 2)
    with Pipeline.load(compiled(dit_bundle, target), device=DEVICE) as pipeline, caplog.at_level(logging.WARNING):
        for _ in range(3):
            clock.now_s += 61
            result = pipeline.generate(**conditions(pipeline, 2))
            assert not result.timings.captured
            assert close_to(result.latents, wanted)
    assert sum(WARNING in record.message for record in caplog.records) == 1
