"""Every entry of what lives on a GPU makes that GPU current, whatever thread calls it, and goes back.

The GPU is a stand-in.
"""

import gc
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import fake_dlpack
import numpy as np
import pytest

import ilf_trt.runtime.gpu
from ilf_trt.contract.bundle import Bundle
from ilf_trt.errors import DeviceError, OutOfMemory
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.gpu.array import DeviceArray
from ilf_trt.runtime.gpu.call import DeviceCall
from ilf_trt.runtime.gpu.cuda import Gpu
from ilf_trt.runtime.gpu.current import Allocated, OnGpu
from ilf_trt.runtime.gpu.device import Device
from ilf_trt.runtime.gpu.trajectory import DeviceTrajectory
from ilf_trt.runtime.gpu.workspace import Workspace
from ilf_trt.runtime.trajectory import Job, RunOptions
from tests.runtime.conftest import Compiled, Machine
from tests.runtime.gpu.test_device import close_to, conditions, on_cpu

SIZES = {"B": 2, "R": 4}
CALLS_FOR_CURRENT = ("get_context", "set_current", "set_context")
Elsewhere = Callable[..., Any]


@contextmanager
def elsewhere(machine: Machine, current: int | None) -> Iterator[Elsewhere]:
    """Runs a call on a thread of its own, on which another GPU, or none, is current before and after it."""

    def run(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(machine.cuda.set_context, current).result()
            try:
                return thread.submit(call, *args, **options).result()
            finally:
                assert thread.submit(lambda: machine.cuda.current).result() == current

    yield run


def in_modules() -> list[type]:
    modules = [
        import_module(f"{ilf_trt.runtime.gpu.__name__}.{each.name}")
        for each in pkgutil.iter_modules(ilf_trt.runtime.gpu.__path__)
    ]
    return [
        each
        for module in modules
        for each in vars(module).values()
        if inspect.isclass(each) and each.__module__ == module.__name__
    ]


def test_whatever_holds_a_gpu_is_on_it() -> None:
    held = [each for each in in_modules() if "self._gpu." in inspect.getsource(each)]
    assert {Gpu, Device, Workspace, DeviceTrajectory, DeviceCall, DeviceArray} <= {*in_modules()}
    inside = {"Scratch", "OnnxRuntimeCudaEngine"}  # only the entries of others call them
    assert {each.__name__ for each in held if not issubclass(each, OnGpu)} <= inside


def test_a_new_entry_cannot_forget_it() -> None:
    used: list[str] = []

    class Probe:
        @contextmanager
        def current(self) -> Iterator[None]:
            used.append("begin")
            yield
            used.append("end")

    class Thing(Allocated):
        def __init__(self) -> None:
            self._gpu = Probe()  # type: ignore[assignment]

        def entry(self, value: int, *, more: int) -> int:
            """Words."""
            return value + more

        def _free(self) -> None:
            used.append("free")

    thing = Thing()
    assert thing.entry(1, more=2) == 3
    assert thing.entry.__doc__ == "Words."
    thing.close()
    assert used == ["begin", "end", "begin", "free", "end"]


@pytest.mark.parametrize(("ordinal", "current"), [(0, None), (1, 0)])
def test_every_entry_works_on_a_fresh_thread(
    ordinal: int, current: int | None, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with elsewhere(machine, current) as run:
        bundle = Bundle.open(compiled(dit_bundle))
        device: Device = run(Device.open, bundle, ordinal, None)
        session = run(device.session)
        graph = next(each for each in bundle.manifest.graphs if each.name == "loop_feedback")
        call = run(session.call, graph, SIZES)
        run(call)
        other = run(session.new_call, graph, SIZES)
        run(other)
        run(other.close)
        plan, spec = bundle.manifest.plan, bundle.manifest.spec
        for pictures in (1, 2):
            trajectory = run(session.trajectory, Job(plan, pictures, spec.latent[1:], spec.guidance))
            rows = {
                port.name: np.zeros(port.resolve({"B": pictures, "R": 2 * pictures}), port.dtype)
                for port in spec.row_conditions
            }
            noise = np.ones((pictures, *spec.latent), np.float32)
            for options in (RunOptions(), RunOptions(), RunOptions(profile=True), RunOptions(on_device=True)):
                latents, _ = run(trajectory.run, noise, rows, 1.5, options)
            run(latents.__dlpack__)
            run(latents.close)
        run(session.close)
        run(run, device.session().close)
        run(device.close)


@pytest.mark.parametrize(("ordinal", "current"), [(0, None), (1, 0)])
def test_every_entry_of_a_gpu_works_on_a_fresh_thread(ordinal: int, current: int | None, machine: Machine) -> None:
    with elsewhere(machine, current) as run:
        gpu: Gpu = run(Gpu.found, ordinal)
        stream = run(gpu.stream)
        memory, pinned, event = run(gpu.allocate, 512, stream), run(gpu.pinned, 512), run(gpu.event)
        gpu.use()
        for each in (event, pinned, memory, stream):
            each.close()
        run(gpu.trim)


@pytest.mark.parametrize(("device", "current"), [("cuda:0", None), ("cuda:1", 0)])
def test_a_session_that_one_thread_made_serves_another(
    device: str, current: int | None, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    wanted = {pictures: on_cpu(dit_bundle, pictures) for pictures in (1, 2)}
    with elsewhere(machine, current) as run:
        pipeline: Pipeline = run(Pipeline.load, compiled(dit_bundle), device=device, sessions=1)
        for pictures in (1, 2, 1):
            result = run(pipeline.generate, **conditions(pipeline, pictures))
            assert close_to(result.latents, wanted[pictures])
        run(pipeline.close)


@pytest.mark.parametrize("current", [None, 1])
def test_an_entry_that_fails_puts_back_what_was_current(current: int | None, machine: Machine) -> None:
    with elsewhere(machine, current) as run:
        gpu: Gpu = run(Gpu.found, 0)
        machine.cuda.fail("pinned")
        with pytest.raises(OutOfMemory):
            run(gpu.pinned, 512)
        machine.cuda.fail("set_current", "CUDA_ERROR_INVALID_DEVICE")
        with pytest.raises(DeviceError, match=r"^cuda:0 cannot be used: .*CUDA_ERROR_INVALID_DEVICE"):
            run(gpu.pinned, 512)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("current", [None, 1])
def test_latents_that_are_dropped_anywhere_leave_the_threads_gpu_current(
    current: int | None, shared: bool, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with elsewhere(machine, current) as run, Pipeline.load(compiled(dit_bundle), device="cuda:0") as pipeline:
        held = [pipeline.generate(**conditions(pipeline, 1), on_device=True).latents]
        if shared:
            capsules = [held[0].__dlpack__(stream=1)]
            held.clear()
        with machine.cuda.during() as counted:
            if shared:
                run(lambda: fake_dlpack.release(capsules.pop()))
            else:
                run(held.clear)
            run(gc.collect)
        assert counted.frees == 1


@pytest.mark.parametrize(
    ("current", "calls"),
    [
        (0, [("get_context",)]),
        (1, [("get_context",), ("set_current", 0), ("set_context", 1)]),
        (None, [("get_context",), ("set_current", 0), ("set_context", None)]),
    ],
)
def test_a_captured_generation_costs_few_calls_for_its_gpu(
    current: int | None, calls: list[tuple[Any, ...]], dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with elsewhere(machine, current) as run, Pipeline.load(compiled(dit_bundle), device="cuda:0") as pipeline:
        asked = conditions(pipeline, 1)
        run(pipeline.generate, **asked)
        begin = len(machine.cuda.journal)
        assert run(pipeline.generate, **asked).timings.captured
        made = [each for each in machine.cuda.journal[begin:] if each[0] in CALLS_FOR_CURRENT]
        assert made == [("set_context", current), *calls]
