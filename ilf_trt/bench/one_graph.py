"""A whole plain step as one graph in ONNX Runtime, bound as the runtime binds its graphs: what splitting costs.

Its modulation still comes from the bundle's `cond`, once a picture.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn

from ilf_trt.contract.bundle import Bundle, graph_file
from ilf_trt.contract.guidance import OFF, effective_scale
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.ports import Graph, Port, Role
from ilf_trt.contract.spec import Precision
from ilf_trt.errors import InvalidRequest
from ilf_trt.export.graph import export_segment
from ilf_trt.export.segments import Segment, segments_of
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.sampling import inference_copy
from ilf_trt.runtime.host import HostTrajectory
from ilf_trt.runtime.onnx_file import OnnxFile
from ilf_trt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from ilf_trt.runtime.route import COND, LAST, Route, Run, route_of
from ilf_trt.runtime.trajectory import Job, RunOptions

from .rivals import Run as RivalRun

UNSPLIT = "unsplit"
UNSPLIT_FILE = f"{UNSPLIT}.onnx"
PARTS = ("pre", "loop_body", "post")
INSIDE = (Role.TOKENS, Role.FEATURES, Role.FEEDBACK, Role.SCALES)
"""Roles of the ports between the parts, which the one graph does not have."""


class Unsplit(Segment):
    """A plain step as one graph."""

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


def unsplit_route(manifest: Manifest, job: Job) -> tuple[dict[str, Graph], Route]:
    """The borders of `cond` and of the one graph, which bears the name of the last one, and the route through both.

    `job.plan` has plain steps only.
    """
    borders = {graph.name: graph for graph in manifest.graphs}
    graphs = {COND: borders[COND], LAST: unsplit_graph(borders)}
    route = route_of(manifest, job)
    runs = [run for run in route.runs if run.step is None]
    for step in range(len(job.plan.steps)):
        views = {port: view for run in route.runs if run.step == step for port, view in run.views.items()}
        whole = graphs[LAST]
        runs.append(Run(LAST, step, {port.name: views[port.name] for port in (*whole.inputs, *whole.outputs)}))
    return graphs, replace(route, runs=tuple(runs))


@contextmanager
def host_trajectory(bundle: Bundle, job: Job, whole: Path, *, threads: int = 0) -> Iterator[HostTrajectory]:
    """The plain steps of `job` on the CPU: the bundle's `cond`, then the graph in the file `whole`.

    With `threads` 0, ONNX Runtime chooses the number of threads. Raises what loading a bundle raises.
    """
    graphs, route = unsplit_route(bundle.manifest, job)
    files = {COND: bundle.path / graph_file(COND), LAST: whole}
    with ExitStack() as stack:
        engines = {
            run: OnnxRuntimeEngine(graph, OnnxFile.of_path(files[run]), threads=threads)
            for run, graph in graphs.items()
        }
        for engine in engines.values():
            stack.callback(engine.close)
        trajectory = HostTrajectory(engines, bundle.constants(), route)
        stack.callback(trajectory.close)
        yield trajectory


@contextmanager
def one_graph(
    model: ILFModel, bundle: Bundle, plan: StepPlan, noise: Tensor, guidance_scale: float, *, threads: int = 0
) -> Iterator[RivalRun]:
    """A run of `plan`, which has plain steps only, for noise of the shape of `noise`, on the CPU.

    `model` is the one that the bundle was built from. Raises InvalidRequest for a precision that the graph does not
    run in on a CPU, and what loading a bundle raises.
    """
    manifest = bundle.manifest
    spec, precision, scale = manifest.spec, manifest.precision, effective_scale(guidance_scale)
    if precision not in (Precision.FP32, Precision.FP16):
        raise InvalidRequest(
            f"one-graph runs fp32 and fp16 on a CPU, the bundle is in {precision}; leave it out of --against"
        )
    guided = spec.guidance and scale > OFF
    height, width = noise.shape[-2:]
    job = Job(plan, len(noise), (height, width), guided)
    copy = inference_copy(model, device="cpu", dtype=getattr(torch, precision.dtype))
    with TemporaryDirectory() as folder:
        whole = Path(folder) / UNSPLIT_FILE
        export_unsplit(copy, manifest, whole)
        del copy
        with host_trajectory(bundle, job, whole, threads=threads) as trajectory:

            def run(conditions: Mapping[str, Tensor], noise: Tensor) -> Tensor:
                rows = spec.conditioning.rows({name: v.numpy() for name, v in conditions.items()}, guided=guided)
                latents, _ = trajectory.run(noise.numpy(), rows, scale, RunOptions())
                return torch.from_numpy(latents)

            yield run
