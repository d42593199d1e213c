"""One graph a step, bound and captured as the five graphs are: what the cost of splitting is measured against."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ilf_trt.contract.bundle import ENGINE_FOLDER, Bundle
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.ports import Graph, Port
from ilf_trt.contract.target import EngineOptions, Library
from ilf_trt.engines.builder import BuildRequest
from ilf_trt.engines.compiler import Compiler
from ilf_trt.engines.job import ask
from ilf_trt.engines.profiles import profile_of
from ilf_trt.engines.report import EngineReport
from ilf_trt.export.graph import export_segment
from ilf_trt.export.segments import Segment, segments_of
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.runtime.gpu.cuda import Gpu, Memory, Stream
from ilf_trt.runtime.gpu.onnxruntime_cuda import OnnxRuntimeCudaEngine
from ilf_trt.runtime.gpu.tensorrt import TensorRT
from ilf_trt.runtime.gpu.trajectory import DeviceTrajectory
from ilf_trt.runtime.host import HostTrajectory
from ilf_trt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from ilf_trt.runtime.route import COND, Route, Run, route_of
from ilf_trt.runtime.trajectory import Job, Trajectory

UNSPLIT = "unsplit"
PARTS = ("pre", "loop_body", "post")
INSIDE = ("hidden", "features", "feedback", "scales")


class Unsplit(Segment):
    """A plain step as one graph, modulations still hoisted."""

    name = UNSPLIT

    def __init__(self, model: ILFModel, segments: Mapping[str, Segment]) -> None:
        graph = unsplit_graph({name: segments[name].graph for name in PARTS})
        super().__init__(model, segments["pre"].spec, graph, {})
        self.segments = nn.ModuleDict({name: segments[name] for name in PARTS})

    def forward(self, *tensors: Tensor) -> Any:
        ports = self.named(tensors)
        pre, loop, post = (self.segments[name] for name in PARTS)
        hidden = pre(*(ports[port.name] for port in pre.graph.inputs))
        features = loop.run(
            hidden, {port.name: ports[port.name] for port in loop.graph.inputs if port.name not in INSIDE}
        )
        return post(*({**ports, "features": features}[port.name] for port in post.graph.inputs))


def unsplit_graph(graphs: Mapping[str, Graph]) -> Graph:
    """The border of the three parts as one."""
    ports: dict[str, Port] = {}
    for name in PARTS:
        ports |= {port.name: port for port in graphs[name].inputs if port.name not in INSIDE}
    return Graph(UNSPLIT, tuple(ports.values()), graphs["post"].outputs)


def export_unsplit(model: ILFModel, manifest: Manifest, path: Path) -> None:
    """Write the graph for a bundle's precision and batch; `model` is in that precision."""
    segments = segments_of(model, manifest.spec, manifest.precision)
    export_segment(Unsplit(model, segments), manifest.batch, path)


def build_unsplit(manifest: Manifest, onnx: Path, engine: Path, options: EngineOptions) -> EngineReport:
    """Build its engine just as the bundle's own are built; raises what building those raises."""
    Compiler.open(options, manifest.precision, None)  # refuses what it would refuse for them
    engine.parent.mkdir(parents=True, exist_ok=True)
    request = BuildRequest(
        library=options.library.value,
        graph=UNSPLIT,
        onnx=str(onnx.resolve()),
        engine=str(engine.resolve()),
        precision=manifest.precision.value,
        expected=(),
        profile=profile_of(
            unsplit_graph(_graphs(manifest)), manifest.batch, manifest.spec, times=len(manifest.plan.times)
        ),
        gpus=tuple(map(str, options.gpus)),
        builder_level=options.builder_level,
        workspace_bytes=options.workspace_bytes,
        any_gpu_of_architecture=options.any_gpu_of_architecture,
        timing_cache=None,
    )
    return EngineReport.from_json(ask(options.library, {"do": "build", "engine": request.as_json()}))


@contextmanager
def opened(
    bundle: Bundle, plan: StepPlan, pictures: int, whole: Path, *, device: str, library: Library | None
) -> Iterator[Trajectory]:
    """A trajectory of `plan`, plain steps only, with the bundle's own `cond` and the graph or engine in `whole`.

    `library` None is ONNX Runtime. Raises what loading a bundle raises.
    """
    manifest = bundle.manifest
    graphs = _graphs(manifest)
    both = (graphs[COND], unsplit_graph(graphs))
    job = Job(plan, pictures, manifest.spec.latent[1:], manifest.spec.guidance)
    route = _route(route_of(manifest, job), both[1])
    cond = bundle.path / ENGINE_FOLDER / library / f"{COND}.engine" if library else bundle.graph_path(COND)
    files = {COND: cond, UNSPLIT: whole}
    with ExitStack() as stack:
        if device == "cpu":
            engines = {graph.name: OnnxRuntimeEngine(graph, files[graph.name], threads=0) for graph in both}
            trajectory: Trajectory = HostTrajectory(engines, bundle.constants(), route)
        else:
            trajectory = _on_gpu(stack, bundle, both, files, route, library)
        stack.callback(trajectory.close)
        yield trajectory


def _on_gpu(
    stack: ExitStack,
    bundle: Bundle,
    graphs: tuple[Graph, ...],
    files: Mapping[str, Path],
    route: Route,
    library: Library | None,
) -> DeviceTrajectory:
    gpu = Gpu.open(0)
    stream = gpu.stream()
    stack.callback(stream.close)
    engines: dict[str, Any] = {}
    trt = TensorRT(library) if library else None
    for graph in graphs:
        path = files[graph.name]
        engines[graph.name] = (
            trt.load(graph, path, stream) if trt else OnnxRuntimeCudaEngine(graph, path, gpu=gpu, stream=stream)
        )
        stack.callback(engines[graph.name].close)
    constants = {name: _uploaded(stack, gpu, stream, array) for name, array in bundle.constants().items()}
    scratch = None
    scratch_bytes = max(engine.scratch_bytes for engine in engines.values())
    if scratch_bytes:
        scratch = gpu.allocate(scratch_bytes, stream)
        stack.callback(scratch.close)
    return DeviceTrajectory(gpu, engines, constants, route, stream, scratch)


def _uploaded(stack: ExitStack, gpu: Gpu, stream: Stream, array: np.ndarray[Any, Any]) -> Memory:
    """A constant of `cond`, which is never bfloat16 here."""
    memory, pinned = gpu.allocate(array.nbytes, stream), gpu.pinned(array.nbytes)
    stack.callback(memory.close)
    pinned.host_bytes()[: array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
    stream.copy(memory, pinned.part(0, memory.size_bytes))
    stream.sync()
    pinned.close()
    return memory


def _route(route: Route, graph: Graph) -> Route:
    """All runs of a step as one run of `graph`, which sees what they saw."""
    runs = [run for run in route.runs if run.step is None]
    for step in range(len(route.plan.steps)):
        seen = {port: view for run in route.runs if run.step == step for port, view in run.views.items()}
        runs.append(Run(graph.name, step, {port.name: seen[port.name] for port in (*graph.inputs, *graph.outputs)}))
    return replace(route, runs=tuple(runs))


def _graphs(manifest: Manifest) -> dict[str, Graph]:
    return {graph.name: graph for graph in manifest.graphs}
