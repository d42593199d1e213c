"""The route of a trajectory: every tensor on it, and which of them each graph run reads and writes.

    h        = pre(latent, modulation(t))                       # a plain step
    features = loop_body(h, feedback=0, scales=0, modulation(t))
    latent   = post(features, modulation(t), solver row)

    h        = pre(latent, modulation(t))                       # a step with feedback
    features = loop_body(h, feedback=0, scales=0, modulation(t))
    feedback = loop_feedback(features, modulation(t))
    features = loop_body(h, feedback, scales, modulation(t_post))
    latent   = post(features, modulation(t_post), solver row)

`cond` runs once before the first step and writes the modulation of every t and t_post.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.graphs import graphs_of
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.ports import COEFFICIENTS, PICTURES, ROWS, Port, Role
from ilf_trt.contract.positions import positions_of
from ilf_trt.contract.reference_cases import NO_SCALES, no_feedback
from ilf_trt.contract.spec import Precision

from .trajectory import Job

COND, LAST = "cond", "post"
LATENTS = ("latent_0", "latent_1")
PREDICTIONS = ("prediction_0", "prediction_1", "prediction_2")
COEFFICIENT_ROWS = "coefficients"
WORK = (Role.TOKENS, Role.FEATURES, Role.FEEDBACK, Role.SCALES)
"""Roles of the tensors that all steps share."""
FIXED = (Role.POSITIONS, Role.INDEX)
"""Roles of the inputs that the host writes once."""


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

    `inputs` names what changes from picture to picture: the conditions, the start latent and the coefficients; `fixed`
    is what the host writes once. Every trajectory shares `constants`, which are not among `tensors`. What neither the
    host nor a run writes is zero. `precision` and `wide_residual` are the bundle's, for the advice in an error.
    """

    plan: StepPlan
    fixed: Mapping[str, NDArray[Any]]
    tensors: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    constants: Mapping[str, Tensor]
    runs: tuple[Run, ...]
    precision: Precision
    wide_residual: bool

    def shape(self, view: View) -> tuple[int, ...]:
        """What a run sees of a tensor."""
        shape = (self.constants.get(view.tensor) or self.tensors[view.tensor]).shape
        return shape if view.row is None else shape[1:]

    @property
    def result(self) -> str:
        """The tensor that holds the latents after the last step."""
        return LATENTS[len(self.plan.steps) % 2]


def route_of(manifest: Manifest, job: Job) -> Route:
    """Lay out a plan: two latents and three predictions alternate, all steps share the other tensors."""
    plan = job.plan
    layout = _Layout.of(manifest, job)
    runs = [Run(COND, None, {name: View(name) for name in layout.ports[COND]})]
    shared = {name: View(name) for name in layout.shared}
    for index in range(len(plan.steps)):
        for graph, views in _step(plan, index, layout.tables, shared, layout.plain):
            runs.append(Run(graph, index, {name: views[name] for name in layout.ports[graph]}))
    inputs = (*(each.name for each in layout.conditions if each.name != "times"), COEFFICIENT_ROWS, LATENTS[0])
    fixed = {name: array for name, array in _host_inputs(manifest, job).items() if name in layout.tensors}
    wide, precision = manifest.spec.wide_residual, manifest.precision
    return Route(plan, fixed, layout.tensors, inputs, layout.constants, tuple(runs), precision, wide)


def tensors_of(manifest: Manifest, job: Job) -> Mapping[str, Tensor]:
    """Every tensor of a job's route by name, the constants left out; nothing is allocated."""
    return _Layout.of(manifest, job).tensors


@dataclass(frozen=True, slots=True)
class _Layout:
    """The tensors of a job, and which of them each kind of run sees."""

    ports: Mapping[str, Mapping[str, Port]]
    tensors: Mapping[str, Tensor]
    conditions: list[Tensor]
    tables: list[Tensor]
    constants: Mapping[str, Tensor]
    shared: tuple[str, ...]
    plain: Mapping[str, str]

    @classmethod
    def of(cls, manifest: Manifest, job: Job) -> "_Layout":
        spec, plan = manifest.spec, job.plan
        graphs = {graph.name: graph for graph in graphs_of(spec, manifest.precision)}
        rows = job.pictures * (2 if job.guided else 1)
        sizes = {PICTURES: job.pictures, ROWS: rows, "T": len(plan.times), **spec.sides(job.size)}

        def tensor(name: str, port: Port, *, by_row: bool = False) -> Tensor:
            return Tensor(name, port.resolve(sizes), port.dtype, by_row)

        ports = {name: {port.name: port for port in (*graph.inputs, *graph.outputs)} for name, graph in graphs.items()}
        steps = [port for name, graph in graphs.items() if name != COND for port in (*graph.inputs, *graph.outputs)]
        constants = {port.name: tensor(port.name, port) for port in spec.constants}
        conditions = [tensor(port.name, port) for port in graphs[COND].inputs if port.name not in constants]
        tables = [tensor(port.name, port, by_row=port.shape[0] == "T") for port in graphs[COND].outputs]
        work = {port.name: tensor(port.name, port) for port in steps if port.role in WORK}
        fixed_inputs = {port.name: tensor(port.name, port) for port in steps if port.role in FIXED}
        plain = {port.name: no_feedback(port.name) for port in steps if port.role is Role.FEEDBACK}
        plain |= {"scales": NO_SCALES}
        zeros = [tensor(zero, ports["loop_body"][name]) for name, zero in plain.items()]
        latents = [tensor(name, ports[LAST]["latent"]) for name in (*LATENTS, *PREDICTIONS)]
        coefficients = Tensor(COEFFICIENT_ROWS, (len(plan.steps), len(COEFFICIENTS)), "float32", by_row=True)
        everything = (
            *conditions,
            coefficients,
            *latents,
            *tables,
            *work.values(),
            *zeros,
            *fixed_inputs.values(),
        )
        tensors = {each.name: each for each in everything}
        return cls(ports, tensors, conditions, tables, constants, (*work, *fixed_inputs), plain)


def _host_inputs(manifest: Manifest, job: Job) -> dict[str, NDArray[Any]]:
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


def _step(
    plan: StepPlan, index: int, tables: list[Tensor], shared: Mapping[str, View], plain: Mapping[str, str]
) -> list[tuple[str, dict[str, View]]]:
    """The graph runs of one step, each with the views of all its ports and more."""
    step = plan.steps[index]

    def rows(time: float) -> dict[str, View]:
        row = plan.times.index(time)
        return {table.name: View(table.name, row if table.by_row else None) for table in tables}

    always = {
        **shared,
        "latent": View(LATENTS[index % 2]),
        "next_latent": View(LATENTS[(index + 1) % 2]),
        "prediction": View(PREDICTIONS[index % 3]),
        "history_1": View(PREDICTIONS[(index - 1) % 3]),
        "history_2": View(PREDICTIONS[(index - 2) % 3]),
        "coefficients": View(COEFFICIENT_ROWS, index),
    }
    at_t, at_t_post = {**always, **rows(step.t)}, {**always, **rows(step.t_post)}
    first_pass = {**at_t, **{name: View(zero) for name, zero in plain.items()}}
    if not step.feedback:
        return [("pre", at_t), ("loop_body", first_pass), (LAST, at_t)]
    return [
        ("pre", at_t),
        ("loop_body", first_pass),
        ("loop_feedback", at_t),
        ("loop_body", at_t_post),
        (LAST, at_t_post),
    ]
