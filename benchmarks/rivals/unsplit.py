"""One graph for a whole step, bound and captured as the five graphs are: the rival that shows the cost of splitting."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, cast

from torch import Tensor, nn

from ilf_trt.contract.bundle import ENGINE_FOLDER, Bundle, graph_file, sha256_of
from ilf_trt.contract.held_file import HeldFile
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.ports import Graph, Port, Role
from ilf_trt.contract.target import EngineOptions, Library
from ilf_trt.engines.builder import BuildRequest
from ilf_trt.engines.compiler import Compiler
from ilf_trt.engines.job import ask
from ilf_trt.engines.profiles import profile_of
from ilf_trt.engines.report import EngineReport
from ilf_trt.export.graph import export_segment
from ilf_trt.export.segments import Segment, segments_of
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.runtime.gpu.cuda import Gpu, upload
from ilf_trt.runtime.gpu.onnxruntime_cuda import OnnxRuntimeCudaEngine
from ilf_trt.runtime.gpu.tensorrt import TensorRT
from ilf_trt.runtime.gpu.trajectory import DeviceTrajectory
from ilf_trt.runtime.gpu.workspace import Workspace
from ilf_trt.runtime.host import HostTrajectory
from ilf_trt.runtime.onnx_file import OnnxFile
from ilf_trt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from ilf_trt.runtime.route import COND, LAST, Route, Run, route_of
from ilf_trt.runtime.trajectory import Job, Trajectory

UNSPLIT = "unsplit"
PARTS = ("pre", "loop_body", "post")
INSIDE = (Role.TOKENS, Role.FEATURES, Role.FEEDBACK, Role.SCALES)
"""Roles of the ports between the parts, which the one graph does not have."""


class Unsplit(Segment):
    """A plain step as one graph; its modulation still comes from `cond`."""

    name = UNSPLIT

    def __init__(self, model: ILFModel, segments: Mapping[str, Segment]) -> None:
        graph = unsplit_graph({name: segments[name].graph for name in PARTS})
        super().__init__(model, segments["pre"].spec, graph, {})
        self.segments = nn.ModuleDict({name: segments[name] for name in PARTS})

    def forward(self, *tensors: Tensor) -> Any:
        ports = self.by_name(tensors)
        pre, loop, post = (cast(Segment, self.segments[name]) for name in PARTS)
        hidden = pre(*(ports[port.name] for port in pre.graph.inputs))
        outer = {port.name: ports[port.name] for port in loop.graph.inputs if port.role not in INSIDE}
        features = loop.run(hidden if isinstance(hidden, tuple) else (hidden,), outer)
        ports |= {port.name: tokens for port, tokens in zip(loop.graph.outputs, features, strict=True)}
        return post(*(ports[port.name] for port in post.graph.inputs))


def unsplit_graph(graphs: Mapping[str, Graph]) -> Graph:
    """The border of the three parts together."""
    ports: dict[str, Port] = {}
    for name in PARTS:
        ports |= {port.name: port for port in graphs[name].inputs if port.role not in INSIDE}
    return Graph(UNSPLIT, tuple(ports.values()), graphs["post"].outputs)


def export_unsplit(model: ILFModel, manifest: Manifest, path: Path) -> None:
    """Write the graph for a bundle's precision and batch; `model` is in that precision."""
    segments = segments_of(model, manifest.spec, manifest.precision)
    export_segment(Unsplit(model, segments), manifest.batch, path)


def build_unsplit(manifest: Manifest, onnx: Path, engine: Path, options: EngineOptions) -> EngineReport:
    """Build the engine of the graph `onnx` as the bundle's engines are built; raises what building those raises."""
    Compiler.open(options, manifest.precision, None)  # raises for a GPU or a precision that the library lacks
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
    """A trajectory of `plan`, which has plain steps only: the bundle's `cond`, then `whole`, a graph or an engine.

    `library` None means ONNX Runtime. Raises what loading a bundle raises.
    """
    manifest = bundle.manifest
    borders = _graphs(manifest)
    graphs = {COND: borders[COND], LAST: unsplit_graph(borders)}
    job = Job(plan, pictures, manifest.spec.latent[1:], manifest.spec.guidance)
    route = _route(route_of(manifest, job), graphs[LAST])
    cond = bundle.path / ENGINE_FOLDER / library / f"{COND}.engine" if library else bundle.path / graph_file(COND)
    files = {COND: cond, LAST: whole}
    with ExitStack() as stack:
        if device == "cpu":
            engines = {
                run: OnnxRuntimeEngine(graph, OnnxFile.of_path(files[run]), threads=0) for run, graph in graphs.items()
            }
            for engine in engines.values():
                stack.callback(engine.close)
            trajectory: Trajectory = HostTrajectory(engines, bundle.constants(), route)
        else:
            trajectory = _on_gpu(stack, bundle, graphs, files, route, library)
        stack.callback(trajectory.close)
        yield trajectory


def _on_gpu(
    stack: ExitStack,
    bundle: Bundle,
    graphs: Mapping[str, Graph],
    files: Mapping[str, Path],
    route: Route,
    library: Library | None,
) -> DeviceTrajectory:
    gpu = Gpu.open(0)
    stream = gpu.stream()
    stack.callback(stream.close)
    engines: dict[str, Any] = {}
    trt = TensorRT(library) if library else None
    for run, graph in graphs.items():
        path = files[run]
        engines[run] = (
            trt.load(graph, HeldFile(path, sha256=sha256_of(path), size_bytes=path.stat().st_size), stream)
            if trt
            else OnnxRuntimeCudaEngine(graph, OnnxFile.of_path(path), gpu=gpu, stream=stream)
        )
        stack.callback(engines[run].close)
    constants = {}
    for name, array in bundle.constants().items():
        constants[name] = gpu.allocate(array.nbytes, stream)
        stack.callback(constants[name].close)
        upload(gpu, stream, constants[name], array)
    space = Workspace(gpu, engines, constants, Lock(), stream=stream)
    stack.callback(space.close)
    return space.bind_route(route)


def _route(route: Route, graph: Graph) -> Route:
    """The route with one run for all runs of a step; it bears the name of the last one, which ends a step."""
    runs = [run for run in route.runs if run.step is None]
    for step in range(len(route.plan.steps)):
        views = {port: view for run in route.runs if run.step == step for port, view in run.views.items()}
        runs.append(Run(LAST, step, {port.name: views[port.name] for port in (*graph.inputs, *graph.outputs)}))
    return replace(route, runs=tuple(runs))


def _graphs(manifest: Manifest) -> dict[str, Graph]:
    return {graph.name: graph for graph in manifest.graphs}
