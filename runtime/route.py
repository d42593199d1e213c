"""The route of a trajectory: every tensor on it, and which of them each graph run reads and writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.graphs import graphs_of
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.ports import BRANCHES, COEFFICIENTS, PICTURES, ROWS, Port
from ilf_trt.contract.positions import positions_of
from ilf_trt.runtime.trajectory import Job

COND, LAST = "cond", "post"
LATENTS = ("latent_0", "latent_1")
PREDICTIONS = ("prediction_0", "prediction_1", "prediction_2")
NO_FEEDBACK, NO_SCALES = "no_feedback", "no_scales"
COEFFICIENT_ROWS = "coefficients"
PLACES = (("pre", "positions"), ("pre", "picture"), *(("post", name) for name in BRANCHES))


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a trajectory; of one `by_row`, a run sees a single row of axis 0."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    by_row: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as one run sees it: whole, or one row."""

    tensor: str
    row: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a graph; `step` is None for `cond`, which runs once a picture."""

    graph: str
    step: int | None
    views: Mapping[str, View]


@dataclass(frozen=True, slots=True)
class Route:
    """All runs of a plan for a number of pictures, in order.

    `given` names what changes from picture to picture: the conditions, the start latent and the coefficients; `fixed`
    is what the host writes once. Every trajectory shares `constants`, which are not among `tensors`. What neither the
    host nor a run writes is zero.
    """

    plan: StepPlan
    fixed: Mapping[str, NDArray[Any]]
    tensors: Mapping[str, Tensor]
    given: tuple[str, ...]
    constants: Mapping[str, Tensor]
    runs: tuple[Run, ...]

    def shape(self, view: View) -> tuple[int, ...]:
        """What a run sees of a tensor."""
        shape = (self.constants.get(view.tensor) or self.tensors[view.tensor]).shape
        return shape if view.row is None else shape[1:]

    @property
    def result(self) -> str:
        """The tensor that holds the latents after the last step."""
        return LATENTS[len(self.plan.steps) % 2]


def route_of(manifest: Manifest, job: Job) -> Route:
    """Lay out a plan: two latents and three predictions take turns, all steps share the rest."""
    spec, plan = manifest.spec, job.plan
    graphs = {graph.name: graph for graph in graphs_of(spec, manifest.precision)}
    rows = job.pictures * (2 if job.guided else 1)
    sizes = {PICTURES: job.pictures, ROWS: rows, "T": len(plan.times), **spec.sides(job.size)}

    def tensor(name: str, port: Port, *, by_row: bool = False) -> Tensor:
        return Tensor(name, port.resolve(sizes), port.dtype, by_row)

    constants = {port.name: tensor(port.name, port) for port in spec.constants}
    ports = {name: {port.name: port for port in (*graph.inputs, *graph.outputs)} for name, graph in graphs.items()}
    asked = [tensor(port.name, port) for port in graphs[COND].inputs if port.name not in constants]
    tables = [tensor(port.name, port, by_row=port.shape[0] == "T") for port in graphs[COND].outputs]
    work = [tensor(name, ports["loop_body"][name]) for name in ("hidden", "features", "feedback", "scales")]
    zeros = [
        tensor(NO_FEEDBACK, ports["loop_body"]["feedback"]),
        tensor(NO_SCALES, ports["loop_body"]["scales"]),
    ]
    latents = [tensor(name, ports["post"]["latent"]) for name in (*LATENTS, *PREDICTIONS)]
    steps = Tensor(COEFFICIENT_ROWS, (len(plan.steps), len(COEFFICIENTS)), "float32", by_row=True)
    fixed = _fixed(manifest, job)
    places = [tensor(name, ports[graph][name]) for graph, name in PLACES if name in ports[graph]]
    tensors = {each.name: each for each in (*asked, steps, *latents, *tables, *work, *zeros, *places)}

    cond = {port.name: View(port.name) for port in (*graphs[COND].inputs, *graphs[COND].outputs)}
    runs = [Run(COND, None, cond)]
    for index in range(len(plan.steps)):
        runs += _step(plan, index, {each.name: each.by_row for each in tables})
    given = (*(each.name for each in asked if each.name != "times"), COEFFICIENT_ROWS, LATENTS[0])
    seen = [Run(run.graph, run.step, {name: run.views[name] for name in ports[run.graph]}) for run in runs]
    fixed = {name: array for name, array in fixed.items() if name in tensors}
    return Route(plan, fixed, tensors, given, constants, tuple(seen))


def _fixed(manifest: Manifest, job: Job) -> dict[str, NDArray[Any]]:
    spec, pictures = manifest.spec, np.arange(job.pictures, dtype=np.int32)
    height, width = (spec.sides(job.size)[side] for side in ("h", "w"))
    fixed = {
        "times": np.array(job.plan.times, np.float32),
        "scales": np.array(manifest.scales, np.float32),
        "picture": np.tile(pictures, 2 if job.guided else 1),
        "conditional": pictures,
        "unconditional": pictures + (job.pictures if job.guided else 0),
    }
    if spec.varies:
        facts = spec.positions
        fixed["positions"] = positions_of(height, width, spec.width, base=facts.base, scale=facts.scale)
    return fixed


def _step(plan: StepPlan, index: int, tables: Mapping[str, bool]) -> list[Run]:
    step = plan.steps[index]

    def rows(time: float) -> dict[str, View]:
        row = plan.times.index(time)
        return {name: View(name, row if by_row else None) for name, by_row in tables.items()}

    here = {
        **{name: View(name) for name in ("hidden", "features", "feedback", "scales")},
        **{name: View(name) for _, name in PLACES},
        "latent": View(LATENTS[index % 2]),
        "next_latent": View(LATENTS[(index + 1) % 2]),
        "prediction": View(PREDICTIONS[index % 3]),
        "history_1": View(PREDICTIONS[(index - 1) % 3]),
        "history_2": View(PREDICTIONS[(index - 2) % 3]),
        "coefficients": View(COEFFICIENT_ROWS, index),
    }
    at_t, at_t_post = {**here, **rows(step.t)}, {**here, **rows(step.t_post)}
    plain = {"feedback": View(NO_FEEDBACK), "scales": View(NO_SCALES)}
    runs = [("pre", at_t), ("loop_body", {**at_t, **plain})]
    if step.feedback:
        runs += [("loop_feedback", at_t), ("loop_body", at_t_post)]
    runs.append((LAST, at_t_post if step.feedback else at_t))
    return [Run(graph, index, views) for graph, views in runs]
