"""One graph for a whole step, bound and captured as the five graphs are: the rival that shows the cost of splitting."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from ilf_trt.bench.one_graph import UNSPLIT, host_trajectory, unsplit_graph, unsplit_route
from ilf_trt.contract.bundle import ENGINE_FOLDER, Bundle, graph_file, sha256_of
from ilf_trt.contract.document import as_type
from ilf_trt.contract.held_file import HeldFile
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.target import EngineOptions, Library
from ilf_trt.engines.builder import BuildRequest
from ilf_trt.engines.compiler import Compiler
from ilf_trt.engines.job import ask
from ilf_trt.engines.profiles import profile_of
from ilf_trt.engines.report import EngineReport
from ilf_trt.runtime.gpu.cuda import Gpu, upload
from ilf_trt.runtime.gpu.onnxruntime_cuda import OnnxRuntimeCudaEngine
from ilf_trt.runtime.gpu.tensorrt import TensorRT
from ilf_trt.runtime.gpu.trajectory import DeviceTrajectory
from ilf_trt.runtime.gpu.workspace import Workspace
from ilf_trt.runtime.onnx_file import OnnxFile
from ilf_trt.runtime.route import COND, LAST
from ilf_trt.runtime.trajectory import Job, Trajectory


def build_unsplit(manifest: Manifest, onnx: Path, engine: Path, options: EngineOptions) -> EngineReport:
    """Build the engine of the graph `onnx` as the bundle's engines are built; raises what building those raises."""
    Compiler.open(options, manifest.precision, None)  # raises for a GPU or a precision that the library lacks
    engine.parent.mkdir(parents=True, exist_ok=True)
    borders = {graph.name: graph for graph in manifest.graphs}
    request = BuildRequest(
        library=options.library.value,
        graph=UNSPLIT,
        onnx=str(onnx.resolve()),
        engine=str(engine.resolve()),
        precision=manifest.precision.value,
        expected=(),
        profile=profile_of(unsplit_graph(borders), manifest.batch, manifest.spec, times=len(manifest.plan.times)),
        gpus=tuple(map(str, options.gpus)),
        builder_level=options.builder_level,
        workspace_bytes=options.workspace_bytes,
        any_gpu_of_architecture=options.any_gpu_of_architecture,
        timing_cache=None,
    )
    return as_type(ask(options.library, {"do": "build", "engine": request.as_json()}), EngineReport)


@contextmanager
def opened(
    bundle: Bundle, plan: StepPlan, pictures: int, whole: Path, *, device: str, library: Library | None
) -> Iterator[Trajectory]:
    """A trajectory of `plan`, which has plain steps only: the bundle's `cond`, then `whole`, a graph or an engine.

    `library` None means ONNX Runtime. Raises what loading a bundle raises.
    """
    spec = bundle.manifest.spec
    job = Job(plan, pictures, spec.latent[1:], spec.guidance)
    opening = host_trajectory(bundle, job, whole) if device == "cpu" else _on_gpu(bundle, job, whole, library)
    with opening as trajectory:
        yield trajectory


@contextmanager
def _on_gpu(bundle: Bundle, job: Job, whole: Path, library: Library | None) -> Iterator[DeviceTrajectory]:
    graphs, route = unsplit_route(bundle.manifest, job)
    cond = bundle.path / ENGINE_FOLDER / library / f"{COND}.engine" if library else bundle.path / graph_file(COND)
    files = {COND: cond, LAST: whole}
    with ExitStack() as stack:
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
        trajectory = space.bind_route(route)
        stack.callback(trajectory.close)
        yield trajectory
