"""The checks of the smoke test: each assumption of docs/runtime.md, then what a server does to the runtime.

A check returns its facts if the assumption holds, raises AssertionError with what happened instead, or NotTried.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.rivals.full_size_models import TINY, TINY_LOOP, make_backbone, make_checkpoint, make_conditions
from benchmarks.rivals.torch_engine import Served, Work, opened
from benchmarks.speed.smoke_ground import SPIN_MS, Ground, NotTried
from ilf_trt import attach
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.plan import make_plan
from ilf_trt.contract.ports import Graph
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.contract.spec import Loop, Precision
from ilf_trt.contract.target import Architecture, EngineOptions, Library
from ilf_trt.errors import DeviceLost, EngineError, InvalidRequest, MissingDependency, OutOfMemory, one_line
from ilf_trt.model.sampling import inference_copy, sample
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.engine import EngineKind, Launch
from ilf_trt.runtime.gpu.cuda import ALIGNMENT, Gpu, Memory, Stream
from ilf_trt.runtime.gpu.device import Device
from ilf_trt.runtime.gpu.engine import DeviceContext, DeviceEngine
from ilf_trt.runtime.gpu.scratch import Scratch

PICTURES, STEPS, GUIDANCE = 3, 4, 2.0
MANY_PICTURES = 1024  # need far more memory than a session gives back when it drops what it keeps
FAR = 1e-3  # of the largest latent; float32 without TF32 on both sides
TOO_MUCH_BYTES = 1 << 44
SLOWER = 1.5
GARBAGE = 0xCD
PLANS_UNDER_LOAD = 5
CUDA_PROVIDER = "CUDAExecutionProvider"

Before = Callable[[str, Stream, Scratch, Mapping[str, int]], None]
"""What is called ahead of a run: its graph, its stream, its scratch memory and its addresses by port."""


@dataclass(frozen=True, slots=True)
class Check:
    """One row. `loses_gpu` says that the process cannot use CUDA afterwards."""

    name: str
    assumption: str
    run: Callable[[Ground], str]
    loses_gpu: bool = False


def memory(ground: Ground) -> str:
    gpu = Gpu.open(0)
    with ExitStack() as stack:
        stream = _stream(gpu, stack)
        sizes = (1, 100, 4096, (1 << 20) + 1)
        blocks = [_allocated(gpu, size, stream, stack) for size in sizes]
        crooked = [block.address for block in blocks if block.address % ALIGNMENT]
        _expect(not crooked, f"addresses {', '.join(map(hex, crooked))} are not aligned to {ALIGNMENT} bytes")
        source, target = gpu.pinned(4096), gpu.pinned(512)
        stack.callback(source.close)
        stack.callback(target.close)
        source.host_bytes()[:] = np.arange(4096, dtype=np.uint16).astype(np.uint8)
        stream.copy(blocks[2], source)
        stream.copy(target, blocks[2].part(1024, 512))
        stream.sync()
        _expect(np.array_equal(target.host_bytes(), source.host_bytes()[1024:1536]), "a part does not hold its bytes")
    return f"sizes {', '.join(map(str, sizes))} bytes"


def capture(ground: Ground) -> str:
    gpu, lane = Gpu.open(0), ground.lane()
    with ExitStack() as stack:
        stream = _stream(gpu, stack)
        source, target = gpu.pinned(1024), gpu.pinned(1024)
        stack.callback(source.close)
        stack.callback(target.close)
        device = _allocated(gpu, 1024, stream, stack)
        stream.zero(device)
        lane.enter(stream)
        owner = object()
        stack.callback(lane.leave, stream, owner)
        tensor = lane.tensor(device.address, (256,), "float32")
        block = (device.address, 1024)

        @torch.inference_mode()
        def triple() -> None:
            tensor.copy_(tensor * 2 + tensor)

        by_torch = Work("triple", triple, [block], [block], owner)
        lane.put(stream, by_torch)  # uncaptured first, as a trajectory does

        def enqueue() -> None:
            stream.copy(device, source)
            lane.put(stream, by_torch)
            stream.copy(target, device)

        graph = stream.capture(enqueue)  # its builder is closed
        stack.callback(graph.close)
        stream.sync()
        _expect(not target.host_bytes().any(), "the work ran during the capture")
        for value in (1.0, 2.0):
            source.host_bytes().view(np.float32)[:] = value
            graph.launch()
            stream.sync()
            got = target.host_bytes().view(np.float32)
            _expect(bool((got == 3 * value).all()), f"a launch gave {got[0]}, expected {3 * value}")
    return "two copies and torch's kernels"


def engines_are_captured(ground: Ground) -> str:
    with _pipeline_of(ground, Library.TENSORRT) as pipeline:
        _generate_thrice(pipeline, _on_the_cpu(pipeline.bundle.path))
    return "five engines"


def scratch_keeps_nothing(ground: Ground) -> str:
    buffer = import_module("cuda.core").Buffer
    largest = 0

    def fill(graph: str, stream: Stream, scratch: Scratch, addresses: Mapping[str, int]) -> None:
        nonlocal largest
        largest = max(largest, scratch.size_bytes)
        if scratch.size_bytes:
            buffer.from_handle(scratch.address, scratch.size_bytes).fill(GARBAGE, stream=stream.core)

    with _pipeline_of(ground, Library.TENSORRT, fill) as pipeline:
        _generate_thrice(pipeline, _on_the_cpu(pipeline.bundle.path))
    _expect(largest > 0, "no engine needed scratch memory, so nothing was shown")
    return f"{largest} bytes, full of {GARBAGE:#x} before every run"


def addresses_are_kept(ground: Ground) -> str:
    places: set[int] = set()

    def note(graph: str, stream: Stream, scratch: Scratch, addresses: Mapping[str, int]) -> None:
        if graph == "pre":
            places.add(addresses["latent"])

    with _pipeline_of(ground, Library.TENSORRT, note) as pipeline:
        _generate_thrice(pipeline, _on_the_cpu(pipeline.bundle.path))
    _expect(len(places) == 2, f"the latents of the steps lay at {len(places)} addresses, expected two in turn")
    return "latents at two addresses in turn"


def kernels_are_compiled(ground: Ground) -> str:
    with _pipeline_of(ground, Library.TENSORRT_RTX) as pipeline:
        asked, wanted = _request(pipeline), _on_the_cpu(pipeline.bundle.path)
        _expect_equal(pipeline.generate(**asked).latents, wanted)
        times = [sum(pipeline.generate(profile=True, **asked).timings.graph_ms.values()) for _ in range(11)]
        second, later = times[0], float(np.median(times[1:]))
        _expect(second <= SLOWER * max(times[1:]), f"the second generation took {second:.3f} ms, later {later:.3f} ms")
        captured = pipeline.generate(**asked)
        _expect(captured.timings.captured, "it was not captured")
        _expect_equal(captured.latents, wanted)
    return f"second generation {second:.3f} ms, later {later:.3f} ms"


def onnxruntime_does_not_wait(ground: Ground) -> str:
    if find_spec("onnxruntime") is None:
        raise NotTried("onnxruntime is not installed")
    import onnxruntime

    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        raise NotTried(f"this onnxruntime has no {CUDA_PROVIDER}")
    spins: list[int] = []

    def spin(graph: str, stream: Stream, scratch: Scratch, addresses: Mapping[str, int]) -> None:
        if graph == "cond" and spins:
            ground.spin(stream)

    with _pipeline_of(ground, None, spin) as pipeline:
        wanted = _on_the_cpu(pipeline.bundle.path)
        _expect_equal(pipeline.generate(**_request(pipeline)).latents, wanted)
        spins.append(1)
        result = pipeline.generate(**_request(pipeline))
        _expect_equal(result.latents, wanted)
    launch_ms, device_ms = (result.timings.launch_us or 0) / 1000, result.timings.device_ms or 0
    _expect(
        launch_ms < SPIN_MS / 2, f"the host waited {launch_ms:.0f} ms for work that was on the stream before its runs"
    )
    return f"launched in {launch_ms:.1f} ms, while the GPU had work for {device_ms:.1f} ms"


def full_memory_has_a_name(ground: Ground) -> str:
    gpu = Gpu.open(0)
    with ExitStack() as stack:
        stream = _stream(gpu, stack)
        try:
            gpu.allocate(TOO_MUCH_BYTES, stream).close()
        except OutOfMemory as error:
            words = one_line(error.__cause__ or error)
        else:
            raise AssertionError(f"{TOO_MUCH_BYTES >> 40} TiB could be allocated")
        _allocated(gpu, 1024, stream, stack)
        stream.sync()
    return words[:120]


def lost_gpu_has_a_name(ground: Ground) -> str:
    gpu = Gpu.open(0)
    stream = gpu.stream()
    ground.lose(stream)
    try:
        stream.sync()
    except DeviceLost as error:
        words = one_line(error.__cause__ or error)
    else:
        raise AssertionError("the stream reported no error")
    try:
        gpu.allocate(1024, stream)
    except DeviceLost:
        return words[:120]
    except Exception as error:
        raise AssertionError(f"the next call is told as {type(error).__name__}: {one_line(error)}") from error
    raise AssertionError("CUDA took further work")


def captured_equals_eager(ground: Ground) -> str:
    farthest = 0.0
    for name in TINY:
        served = _served(name)
        with opened(served, ground.lane()) as pipeline:
            asked = _request(pipeline, name)
            wanted = _by_torch(served, asked, ground.lane().device)
            for index in range(4):
                result = pipeline.generate(**asked)
                _expect(result.timings.captured == (index > 0), f"generation {index}: captured is {index == 0}")
                farthest = max(farthest, _expect_equal(result.latents, wanted))
                ground.empty_cache()  # what a captured graph holds must not go with it
    return f"{', '.join(TINY)}: relative difference at most {farthest:.1e}"


def session_on_another_thread(ground: Ground) -> str:
    served = _served("tiny-dit")
    with opened(served, ground.lane()) as pipeline:
        asked = _request(pipeline)
        wanted = _by_torch(served, asked, ground.lane().device)
        first = _first_picture(asked)
        alone = _by_torch(served, first, ground.lane().device)
        for request, expected in ((asked, wanted), (first, alone), (asked, wanted), (first, alone)):
            with ThreadPoolExecutor(1) as thread:
                _expect_equal(thread.submit(_latents, pipeline, request).result(), expected)
        graph, arrays = _single_graph(pipeline)
        with ThreadPoolExecutor(1) as thread:
            outputs = thread.submit(pipeline.run, graph.name, arrays).result()
        _expect(all(np.isfinite(value).all() for value in outputs.values()), "a single graph gave NaN or infinity")
    return "four generations of two batches and one graph, each on a new thread"


def another_gpu_is_current(ground: Ground) -> str:
    if ground.gpus < 2:
        raise NotTried("this machine has one GPU")
    served = _served("tiny-dit")
    with opened(served, ground.lane(1), ordinal=1) as second, opened(served, ground.lane(0)) as first:
        asked = _request(first)
        wanted = _by_torch(served, asked, ground.lane().device)
        for _ in range(3):
            for pipeline in (second, first):
                _expect_equal(pipeline.generate(**asked).latents, wanted)
    return "two GPUs by turns on one thread"


def dlpack(ground: Ground) -> str:
    served = _served("tiny-dit")
    with opened(served, ground.lane()) as pipeline, ExitStack() as stack:
        gpu = Gpu.open(0)
        stream = _stream(gpu, stack)
        asked = _request(pipeline)
        wanted = _by_torch(served, asked, ground.lane().device)
        for _ in range(3):
            there = ground.latents_on_gpu(asked["latents"], gpu, stream)
            latents = pipeline.generate(**{**asked, "latents": there}, on_device=True).latents
            _expect_equal(ground.latents_from_gpu(latents), wanted)
            latents.close()
            if hasattr(there, "close"):
                there.close()
    return "three times in and out"


def capture_under_load(ground: Ground) -> str:
    served, stop = _served("tiny-dit"), Event()
    with opened(served, ground.lane()) as pipeline, ThreadPoolExecutor(1) as thread, ExitStack() as stack:
        gpu = Gpu.open(0)
        stream = _stream(gpu, stack)
        load = thread.submit(ground.churn, gpu, stream, stop)
        try:
            asked = _request(pipeline)
            refused = []
            for steps in range(STEPS, STEPS + PLANS_UNDER_LOAD):
                plan = pipeline.plan(steps)
                results = [pipeline.generate(plan=plan, **asked) for _ in range(2)]
                _expect_equal(results[1].latents, results[0].latents)
                refused += [] if results[1].timings.captured else [steps]
        finally:
            stop.set()
            rounds = load.result()
        _expect(not refused, f"{len(refused)} of {PLANS_UNDER_LOAD} plans were not captured at the first attempt")
    return f"{PLANS_UNDER_LOAD} plans, {rounds} allocations on another thread meanwhile"


def usable_after_full_memory(ground: Ground) -> str:
    served = replace(_served("tiny-dit"), pictures=MANY_PICTURES)
    with opened(served, ground.lane()) as pipeline, ExitStack() as stack:
        gpu = Gpu.open(0)
        stream = _stream(gpu, stack)
        asked = _request(pipeline)
        wanted = _by_torch(served, asked, ground.lane().device)
        _expect_equal(pipeline.generate(**asked).latents, wanted)
        with ground.full(gpu, stream):
            try:
                pipeline.generate(**make_conditions("tiny-dit", MANY_PICTURES))
            except OutOfMemory:
                pass
            else:
                raise AssertionError(f"{MANY_PICTURES} pictures found room on a full GPU")
        for _ in range(2):
            _expect_equal(pipeline.generate(**asked).latents, wanted)
    return "OutOfMemory, then the same latents as before"


CHECKS = (
    Check("memory", "cuda.core aligns to 256 bytes, and Buffer.from_handle with an owner copies", memory),
    Check("capture", "a graph builder captures all work on the stream, and the graph outlives it", capture),
    Check("capture-engines", "TensorRT's runs are captured too", engines_are_captured),
    Check("scratch", "a TensorRT context keeps nothing in its scratch memory between runs", scratch_keeps_nothing),
    Check("addresses", "a capture keeps each address that a TensorRT context had", addresses_are_kept),
    Check("compiled-kernels", "TensorRT-RTX has compiled its kernels when the first run ends", kernels_are_compiled),
    Check("onnxruntime", "ONNX Runtime on a user's stream does not synchronise", onnxruntime_does_not_wait),
    Check("full", "CUDA's error for full memory is told from others", full_memory_has_a_name),
    Check("captured-equals-eager", "a captured trajectory by torch equals eager torch", captured_equals_eager),
    Check("threads", "a session that is kept serves any thread", session_on_another_thread),
    Check("second-gpu", "a pipeline on cuda:1 works while cuda:0 is current", another_gpu_is_current),
    Check("dlpack", "latents come from torch and go to torch by DLPack", dlpack),
    Check("load", "a capture succeeds while another thread allocates", capture_under_load),
    Check("usable", "a pipeline is usable after OutOfMemory", usable_after_full_memory),
    Check("lost", "CUDA's errors that last are told from others", lost_gpu_has_a_name, loses_gpu=True),
)


@cache
def _served(name: str) -> Served:
    torch.manual_seed(0)
    model = attach(make_backbone(name), TINY_LOOP).eval()
    model.feedback.scales.data.fill_(0.1)
    blocks, loop = len(model.adapter.blocks), Loop(*TINY_LOOP)
    plan = make_plan(DEFAULT_SCHEDULER, STEPS, blocks=blocks, loop=loop, feedback="outer:1")
    tokens = TINY[name]["text_tokens"] or 1
    return Served(model, plan, DEFAULT_SCHEDULER, Precision.FP32, PICTURES, tokens, GUIDANCE)


def _request(pipeline: Pipeline, name: str = "tiny-dit") -> dict[str, Any]:
    shape = (PICTURES, *pipeline.manifest.spec.latent)
    latents = np.random.default_rng(1).standard_normal(shape, np.float32)
    return {"latents": latents, "guidance_scale": GUIDANCE, **make_conditions(name, PICTURES)}


def _first_picture(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value[:1] if isinstance(value, np.ndarray) else value for name, value in asked.items()}


def _latents(pipeline: Pipeline, asked: Mapping[str, Any]) -> NDArray[np.float32]:
    return pipeline.generate(**asked).latents


def _by_torch(served: Served, asked: Mapping[str, Any], device: str) -> NDArray[np.float32]:
    """What eager torch gives on the same device."""
    model = inference_copy(served.model, device=device, dtype=torch.float32)
    tensors = {name: torch.from_numpy(v).to(device) for name, v in asked.items() if isinstance(v, np.ndarray)}
    noise = tensors.pop("latents")
    latents = sample(model, served.plan, served.scheduler, tensors, noise, guidance_scale=asked["guidance_scale"])
    return latents.cpu().numpy()


def _on_the_cpu(bundle: Path) -> NDArray[np.float32]:
    with Pipeline.load(bundle, threads=1) as pipeline:
        return pipeline.generate(**_request(pipeline)).latents


def _generate_thrice(pipeline: Pipeline, wanted: NDArray[np.float32]) -> None:
    for captured in (False, True, True):
        result = pipeline.generate(**_request(pipeline))
        _expect(result.timings.captured == captured, f"captured is {not captured}, expected {captured}")
        _expect_equal(result.latents, wanted)


@contextmanager
def _pipeline_of(ground: Ground, library: Library | None, before: Before | None = None) -> Iterator[Pipeline]:
    """A bundle of the tiny DiT in a library."""
    bundle = Bundle.open(_bundle(ground, library))
    device = Device.open(bundle, 0, EngineKind(library) if library else EngineKind.ONNXRUNTIME)
    if before is not None:
        device.engines = {name: _Watched(engine, before) for name, engine in device.engines.items()}
    with Pipeline.of(bundle, device, sessions=1) as pipeline:
        yield pipeline


def _bundle(ground: Ground, library: Library | None) -> Path:
    """Build what is not built yet; raises NotTried without the library, and if it refuses this GPU."""
    if library in ground.bundles:
        return ground.bundles[library]
    if library is not None and find_spec(library.module) is None:
        raise NotTried(f"{library.module} is not installed")
    if not ground.builds:
        raise NotTried("a dry run builds nothing")
    try:
        from ilf_trt.assembly.conductor import build, compile_bundle
        from ilf_trt.assembly.options import BuildOptions
        from ilf_trt.contract.spec import BatchRange
    except ImportError as error:
        raise NotTried(f"a bundle cannot be built here ({one_line(error)})") from error
    if None not in ground.bundles:
        checkpoint, path = ground.work / "tiny-dit", ground.work / "tiny-dit.ilf"
        if not (checkpoint / "conditions.npz").is_file():
            make_checkpoint("tiny-dit", checkpoint)
        options = BuildOptions(batch=BatchRange(1, PICTURES, PICTURES), steps=STEPS, feedback="outer:1")
        build(str(checkpoint), path, replace(options, verify=False), force=True)
        ground.bundles[None] = path
    if library is not None:
        path = ground.work / f"tiny-dit-{library}.ilf"
        gpus = (Architecture(*torch.cuda.get_device_capability()),) if library is Library.TENSORRT_RTX else ()
        try:
            compile_bundle(ground.bundles[None], path, EngineOptions(library, gpus), force=True)
        except (EngineError, InvalidRequest, MissingDependency) as error:
            raise NotTried(f"{library} cannot build here ({one_line(error)})") from error
        ground.bundles[library] = path
    return ground.bundles[library]


class _Watched:
    """An engine that calls `before` ahead of every run that it enqueues."""

    def __init__(self, engine: DeviceEngine, before: Before) -> None:
        self.engine, self.before = engine, before
        self.graph, self.capturable, self.close = engine.graph, engine.capturable, engine.close

    def context(self, shapes: Mapping[str, tuple[int, ...]], stream: Stream, scratch: Scratch) -> "_WatchedContext":
        return _WatchedContext(self, self.engine.context(shapes, stream, scratch), stream, scratch)


class _WatchedContext:
    def __init__(self, engine: _Watched, context: DeviceContext, stream: Stream, scratch: Scratch) -> None:
        self.engine, self.context, self.stream, self.scratch = engine, context, stream, scratch
        self.scratch_bytes = context.scratch_bytes
        self.check_capturable, self.close = context.check_capturable, context.close

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> Launch:
        launch = self.context.bind(addresses, shapes)

        def watched_launch() -> None:
            self.engine.before(self.engine.graph.name, self.stream, self.scratch, addresses)
            launch()

        return watched_launch


def _single_graph(pipeline: Pipeline) -> tuple[Graph, dict[str, NDArray[Any]]]:
    manifest = pipeline.manifest
    graph = next(each for each in manifest.graphs if each.name == "loop_feedback")
    sizes = {"B": PICTURES, "R": 2 * PICTURES, **manifest.spec.sides(manifest.spec.latent[1:])}
    return graph, {port.name: np.ones(port.resolve(sizes), port.array_dtype) for port in graph.inputs}


def _stream(gpu: Gpu, stack: ExitStack) -> Stream:
    stream = gpu.stream()
    stack.callback(stream.close)
    stack.callback(stream.sync)
    stack.callback(gpu.use)
    return stream


def _allocated(gpu: Gpu, size_bytes: int, stream: Stream, stack: ExitStack) -> Memory:
    block = gpu.allocate(size_bytes, stream)
    stack.callback(block.close)
    return block


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _expect_equal(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """The relative difference; raises AssertionError if it is too large."""
    far = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    _expect(far <= FAR, f"latents differ by {far:.1e} of the largest, expected at most {FAR:g}")
    return far
