"""A bundle on the CPU: its graphs in ONNX Runtime, its tensors in numpy."""

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.bundle import Bundle
from ilf_trt.contract import Graph, Precision
from ilf_trt.errors import InvalidRequest
from ilf_trt.manifest import Manifest
from ilf_trt.schedule import StepPlan

from .engine import Array, Engine, Launch
from .onnxruntime_engine import OnnxRuntimeEngine
from .route import COEFFICIENT_ROWS, LATENTS, PREDICTIONS, Route, View, route_of
from .session import Session, Timings


class Host:
    """Engines on the CPU, shared by the sessions."""

    max_sessions: int | None = None

    def __init__(self, engines: Mapping[str, Engine], manifest: Manifest, constants: Mapping[str, Array]) -> None:
        self.engines = engines
        self._manifest = manifest
        self._constants = constants

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int) -> "Host":
        """Load every graph; raises InvalidRequest for bf16, BundleError, EngineError, PortMismatch."""
        manifest = bundle.manifest
        if manifest.precision is Precision.BF16:
            raise InvalidRequest(
                f"{bundle.path} is in bf16, which ONNX Runtime does not run on a CPU; build it with --precision fp16"
            )

        def engine(graph: Graph, path: Path) -> Engine:
            return OnnxRuntimeEngine(graph, path, threads=threads)

        engines = {graph.name: engine(graph, bundle.graph_path(graph.name)) for graph in manifest.graphs}
        return cls(engines, manifest, bundle.constants())

    @property
    def description(self) -> str:
        return "CPU, ONNX Runtime"

    def session(self) -> Session:
        return Session(self._bind)

    def run(self, graph: Graph, arrays: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """One run of a graph, from the arrays of its inputs into those of its outputs."""
        self.engines[graph.name].bind({**arrays, **outputs})()

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()

    def _bind(self, plan: StepPlan, pictures: int) -> "HostTrajectory":
        return HostTrajectory(self.engines, self._constants, route_of(self._manifest, plan, pictures))


class HostTrajectory:
    """A route in numpy arrays."""

    def __init__(self, engines: Mapping[str, Engine], constants: Mapping[str, Array], route: Route) -> None:
        self._route = route
        self._graphs = tuple(engines)
        self._arrays = {name: np.zeros(each.shape, each.dtype) for name, each in route.tensors.items()}
        self._arrays["times"][:] = route.plan.times
        self._arrays["scales"][:] = route.scales
        self._arrays[COEFFICIENT_ROWS][:, 1:7] = [step.solver for step in route.plan.steps]
        self._runs: list[tuple[str, int | None, Launch]] = []
        for run in route.runs:
            views = {port: self._view(view, constants) for port, view in run.views.items()}
            self._runs.append((run.graph, run.step, engines[run.graph].bind(views)))

    def run(
        self,
        noise: Array,
        conditions: Mapping[str, Array],
        guidance_scale: float,
        *,
        profile: bool = False,
        on_device: bool = False,
    ) -> tuple[NDArray[Any], Timings]:
        begin = perf_counter_ns()
        route, arrays = self._route, self._arrays
        for name, value in conditions.items():
            arrays[name][:] = value
        np.multiply(noise, np.float32(route.plan.initial_scale), out=arrays[LATENTS[0]])
        for name in PREDICTIONS:
            arrays[name].fill(0)
        arrays[COEFFICIENT_ROWS][:, 0] = guidance_scale

        graph_ns = dict.fromkeys(self._graphs, 0)
        step_ns = [0] * len(route.plan.steps)
        for graph, step, launch in self._runs:
            then = perf_counter_ns()
            launch()
            taken = perf_counter_ns() - then
            graph_ns[graph] += taken
            if step is not None:
                step_ns[step] += taken
        latents = arrays[route.result].copy()
        total_ms = (perf_counter_ns() - begin) / 1e6
        graph_ms = {name: value / 1e6 for name, value in graph_ns.items()}
        return latents, Timings(total_ms, graph_ms, tuple(value / 1e6 for value in step_ns), len(step_ns))

    def close(self) -> None:
        self._runs.clear()

    def _view(self, view: View, constants: Mapping[str, Array]) -> Array:
        array = constants[view.tensor] if view.tensor in constants else self._arrays[view.tensor]
        return array if view.row is None else array[view.row]
