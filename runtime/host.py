"""A bundle on the CPU: its graphs in ONNX Runtime, its tensors in numpy."""

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.arrays import is_finite
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.ports import GRAPHS, Graph
from ilf_trt.contract.spec import Precision
from ilf_trt.errors import InvalidRequest, NonFinite

from .engine import Array, Engine, Launch
from .finite import error_of_run, unsteady_error
from .onnx_file import OnnxFile
from .onnxruntime_engine import OnnxRuntimeEngine
from .onnxruntime_import import onnxruntime_version
from .route import COEFFICIENT_ROWS, LAST, LATENTS, PREDICTIONS, Route, Run, View, route_of
from .session import KEPT_TRAJECTORIES, Session
from .start_noise import check_finite_start
from .timings import Timings
from .trajectory import Job, RunOptions

CPU_LINES = 64  # of /proc/cpuinfo; the first processor's


class Host:
    """Engines on the CPU; all sessions share them."""

    on_gpu = False
    description = "CPU, ONNX Runtime"
    max_sessions: int | None = None

    def __init__(self, engines: Mapping[str, Engine], manifest: Manifest, constants: Mapping[str, Array]) -> None:
        self.engines = engines
        self._manifest = manifest
        self._constants = constants

    @property
    def device_name(self) -> str:
        return processor_name()

    @property
    def library(self) -> str:
        return onnxruntime_version()

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int, graphs: Sequence[str] | None = None) -> "Host":
        """Load every graph, or those of `graphs`.

        Raises InvalidRequest for bf16, BundleError, EngineError, PortMismatch.
        """
        manifest = bundle.manifest
        precisions = {"--precision": manifest.precision}
        precisions |= {"--text-precision": manifest.text.precision} if manifest.text else {}
        precisions |= {"--decoder-precision": manifest.decoder.precision} if manifest.decoder else {}
        for option, precision in precisions.items():
            if precision is Precision.BF16:
                instead = "fp32" if option == "--text-precision" else "fp16"
                raise InvalidRequest(
                    f"{bundle.path} is in bf16, which ONNX Runtime does not run on a CPU; build the bundle with "
                    f"{option} {instead}"
                )
        wanted = [graph for graph in manifest.graphs if graphs is None or graph.name in graphs]
        files = [(graph, OnnxFile.of_bundle(bundle, graph)) for graph in wanted]
        engines: dict[str, Engine] = {
            graph.name: OnnxRuntimeEngine(graph, file, threads=threads) for graph, file in files
        }
        return cls(engines, manifest, bundle.constants())

    def session(self, max_trajectories: int = KEPT_TRAJECTORIES) -> Session:
        """A new session; the last `max_trajectories` trajectories stay bound."""
        return Session(self._bind, self._bind_call, max_trajectories=max_trajectories)

    def close(self) -> None:
        """Free the engines; the sessions must be closed."""
        for engine in self.engines.values():
            engine.close()

    def _bind(self, job: Job) -> "HostTrajectory":
        return HostTrajectory(self.engines, self._constants, route_of(self._manifest, job))

    def _bind_call(self, graph: Graph, sizes: Mapping[str, int]) -> "HostCall":
        return HostCall(self.engines[graph.name], graph, sizes)


def processor_name() -> str:
    """The CPU's model as the kernel tells it, else its architecture."""
    with suppress(OSError, ValueError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        for line in islice(lines, CPU_LINES):
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()


class HostCall:
    """A single graph, bound to numpy arrays."""

    def __init__(self, engine: Engine, graph: Graph, sizes: Mapping[str, int]) -> None:
        self.inputs, self.outputs = (
            {port.name: np.zeros(port.resolve(sizes), port.array_dtype) for port in ports}
            for ports in (graph.inputs, graph.outputs)
        )
        self._launch: Launch = engine.bind({**self.inputs, **self.outputs})

    def __call__(self) -> None:
        self._launch()

    def close(self) -> None:
        del self._launch


class HostTrajectory:
    """A trajectory, bound to numpy arrays."""

    def __init__(self, engines: Mapping[str, Engine], constants: Mapping[str, Array], route: Route) -> None:
        self._route = route
        self._graphs = tuple(name for name in engines if name in GRAPHS)
        self._arrays = {name: np.zeros(each.shape, each.dtype) for name, each in route.tensors.items()}
        for name, value in route.fixed.items():
            self._arrays[name][:] = value
        self._arrays[COEFFICIENT_ROWS][:, 1:7] = [step.solver for step in route.plan.steps]
        self._runs: list[tuple[Run, Launch, list[Array]]] = []
        for run in route.runs:
            engine = engines[run.graph]
            views = {port: self._view(view, constants) for port, view in run.views.items()}
            outputs = [views[port.name] for port in engine.graph.outputs]
            self._runs.append((run, engine.bind(views), outputs))

    def run(
        self,
        noise: Array,
        conditions: Mapping[str, Array],
        guidance_scale: float,
        options: RunOptions,
    ) -> tuple[NDArray[Any], Timings]:
        """See `Trajectory.run`. The CPU always times every graph; `profile` and `on_device` have no effect.

        The first step whose latents or prediction are not finite ends the run.
        """
        begin = perf_counter_ns()
        route, arrays = self._route, self._arrays
        for name, value in conditions.items():
            arrays[name][:] = value
        with np.errstate(over="ignore"):  # the first step raises for it
            np.multiply(noise, np.float32(route.plan.initial_scale), out=arrays[LATENTS[0]])
        for name in PREDICTIONS:
            arrays[name].fill(0)
        arrays[COEFFICIENT_ROWS][:, 0] = guidance_scale

        graph_ns = dict.fromkeys(self._graphs, 0)
        step_ns = [0] * len(route.plan.steps)
        for run, launch, outputs in self._runs:
            launch_begin = perf_counter_ns()
            launch()
            launch_ns = perf_counter_ns() - launch_begin
            graph_ns[run.graph] += launch_ns
            if run.step is None:
                continue
            step_ns[run.step] += launch_ns
            if run.graph == LAST:
                if not all(map(is_finite, outputs)):
                    raise self._error_of_step(run.step, guidance_scale)
                if options.watch is not None:
                    options.watch()
        latents = arrays[route.result].copy()
        total_ms = (perf_counter_ns() - begin) / 1e6
        graph_ms = {name: value / 1e6 for name, value in graph_ns.items()}
        return latents, Timings(total_ms, graph_ms, tuple(value / 1e6 for value in step_ns), len(step_ns))

    def close(self) -> None:
        self._runs.clear()

    def _error_of_step(self, step: int, guidance_scale: float) -> NonFinite:
        """Run `cond` and the graphs of a step again, on the tensors that the step left, to find the first to blame."""
        if step == 0:
            check_finite_start(self._arrays[LATENTS[0]])
        for run, launch, outputs in self._runs:
            if run.step in (None, step):
                launch()
                if not all(map(is_finite, outputs)):
                    return error_of_run(run, self._route, guidance_scale)
        return unsteady_error(self._route, step)

    def _view(self, view: View, constants: Mapping[str, Array]) -> Array:
        array = constants[view.tensor] if view.tensor in constants else self._arrays[view.tensor]
        return array if view.row is None else array[view.row]
