"""A session: the buffers of one trajectory at a time, and the runs of every graph bound to them beforehand."""

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract import COEFFICIENTS
from ilf_trt.manifest import Manifest
from ilf_trt.schedule import StepPlan

from .engine import Array, Engine, Launch

KEPT_TRAJECTORIES = 4


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds of one generation: in all, in each graph, and in each step's engine runs."""

    total_ms: float
    graph_ms: dict[str, float]
    step_ms: tuple[float, ...]

    @property
    def overhead_us_per_step(self) -> float:
        """What a step costs beyond its engines: Python and the copies in and out."""
        return (self.total_ms - sum(self.graph_ms.values())) * 1000 / len(self.step_ms)


class Session:
    """Runs one trajectory at a time; several sessions share engines, none shares buffers."""

    def __init__(self, engines: Mapping[str, Engine], manifest: Manifest, constants: Mapping[str, Array]) -> None:
        self._engines = engines
        self._manifest = manifest
        self._constants = constants
        self._trajectories: dict[tuple[StepPlan, int], Trajectory] = {}

    def trajectory(self, plan: StepPlan, pictures: int) -> "Trajectory":
        """The bound runs of a plan for a number of pictures; the last few are kept."""
        key = (plan, pictures)
        kept = self._trajectories.pop(key, None) or Trajectory(
            self._engines, self._manifest, self._constants, plan, pictures
        )
        self._trajectories[key] = kept
        while len(self._trajectories) > KEPT_TRAJECTORIES:
            del self._trajectories[next(iter(self._trajectories))]
        return kept


class Trajectory:
    """Every graph run of a plan, bound to memory: replaying it binds and allocates nothing."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        manifest: Manifest,
        constants: Mapping[str, Array],
        plan: StepPlan,
        pictures: int,
    ) -> None:
        self._engines = engines
        self._plan = plan
        spec = manifest.spec
        self._sizes = {"B": pictures, "2B": 2 * pictures, "T": len(plan.times)}
        self._time_index = {time: index for index, time in enumerate(plan.times)}

        self._tables = {port.name: self._array(port.name, "cond") for port in engines["cond"].graph.outputs}
        inputs = [port.name for port in engines["cond"].graph.inputs if port.name not in constants]
        self._conditions = {name: self._array(name, "cond") for name in inputs}
        self._conditions["times"][:] = plan.times
        self._latents = [self._array("latent", "post") for _ in range(2)]
        self._predictions = [self._array("latent", "post") for _ in range(3)]
        self._coefficients = np.zeros((len(plan.steps), len(COEFFICIENTS)), np.float32)
        self._coefficients[:, 1:7] = [step.solver for step in plan.steps]
        self._work = {name: self._array(name, "loop_feedback") for name in ("features", "feedback")}
        self._work["hidden"] = self._array("hidden", "loop_body")
        self._no_feedback = np.zeros_like(self._work["feedback"])
        self._scales = np.array(manifest.scales, np.float32)
        self._no_scales = np.zeros(spec.loop.size, np.float32)

        self._cond = engines["cond"].bind({**self._conditions, **constants, **self._tables})
        self._steps = [self._bind_step(index) for index in range(len(plan.steps))]

    def run(self, noise: Array, conditions: Mapping[str, Array], guidance_scale: float) -> tuple[NDArray[Any], Timings]:
        """noise (B, C, H, W) of unit variance, conditions under their port names -> a new array of latents, timings."""
        begin = perf_counter_ns()
        for name, value in conditions.items():
            self._conditions[name][:] = value
        np.multiply(noise, np.float32(self._plan.initial_scale), out=self._latents[0])
        for prediction in self._predictions:
            prediction.fill(0)
        self._coefficients[:, 0] = guidance_scale

        graph_ns = dict.fromkeys(self._engines, 0)
        then = perf_counter_ns()
        self._cond()
        now = perf_counter_ns()
        graph_ns["cond"] = now - then
        step_ns = []
        for launches in self._steps:
            spent = 0
            for name, launch in launches:
                then = perf_counter_ns()
                launch()
                taken = perf_counter_ns() - then
                graph_ns[name] += taken
                spent += taken
            step_ns.append(spent)
        latents = self._latents[len(self._steps) % 2].copy()
        total_ns = perf_counter_ns() - begin
        milliseconds = {name: value / 1e6 for name, value in graph_ns.items()}
        return latents, Timings(total_ns / 1e6, milliseconds, tuple(value / 1e6 for value in step_ns))

    def _bind_step(self, index: int) -> list[tuple[str, Launch]]:
        step = self._plan.steps[index]
        at_t, at_t_post = self._rows(step.t), self._rows(step.t_post)
        here = {
            **self._work,
            "latent": self._latents[index % 2],
            "next_latent": self._latents[(index + 1) % 2],
            "prediction": self._predictions[index % 3],
            "history_1": self._predictions[(index - 1) % 3],
            "history_2": self._predictions[(index - 2) % 3],
            "coefficients": self._coefficients[index],
        }
        plain = {"feedback": self._no_feedback, "scales": self._no_scales}
        launches = [("pre", {**here, **at_t}), ("loop_body", {**here, **at_t, **plain})]
        if step.feedback:
            launches += [
                ("loop_feedback", {**here, **at_t}),
                ("loop_body", {**here, **at_t_post, "scales": self._scales}),
            ]
        launches.append(("post", {**here, **(at_t_post if step.feedback else at_t)}))
        return [(name, self._engines[name].bind(arrays)) for name, arrays in launches]

    def _rows(self, time: float) -> dict[str, Array]:
        """The condition tables as the graphs after `cond` see them: per-time ones at this time's row."""
        varying = {port.name for port in self._engines["cond"].graph.outputs if port.shape[0] == "T"}
        index = self._time_index[time]
        return {name: table[index] if name in varying else table for name, table in self._tables.items()}

    def _array(self, name: str, graph: str) -> Array:
        border = self._engines[graph].graph
        port = next(port for port in (*border.inputs, *border.outputs) if port.name == name)
        return np.zeros(port.resolve(self._sizes), port.dtype)
