"""The route of a trajectory: every tensor on it, and which of them each graph run reads and writes."""

from collections.abc import Mapping
from dataclasses import dataclass

from ilf_trt.contract import COEFFICIENTS, Port
from ilf_trt.manifest import Manifest
from ilf_trt.schedule import StepPlan

COND = "cond"
LATENTS = ("latent_0", "latent_1")
PREDICTIONS = ("prediction_0", "prediction_1", "prediction_2")
NO_FEEDBACK, NO_SCALES = "no_feedback", "no_scales"
COEFFICIENT_ROWS = "coefficients"


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

    `given` names what changes from picture to picture: the conditions, the start latent and the coefficients. Every
    trajectory shares `constants`, which are not among `tensors`. What neither the host nor a run writes is zero.
    """

    plan: StepPlan
    scales: tuple[float, ...]
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


def route_of(manifest: Manifest, plan: StepPlan, pictures: int) -> Route:
    """Lay out a plan: two latents and three predictions take turns, all steps share the rest."""
    graphs = {graph.name: graph for graph in manifest.graphs}
    sizes = {"B": pictures, "2B": 2 * pictures, "T": len(plan.times)}

    def tensor(name: str, port: Port, *, by_row: bool = False) -> Tensor:
        return Tensor(name, port.resolve(sizes), port.dtype, by_row)

    constants = {port.name: tensor(port.name, port) for port in manifest.spec.constants}
    ports = {graph.name: {port.name: port for port in (*graph.inputs, *graph.outputs)} for graph in manifest.graphs}
    asked = [tensor(port.name, port) for port in graphs[COND].inputs if port.name not in constants]
    tables = [tensor(port.name, port, by_row=port.shape[0] == "T") for port in graphs[COND].outputs]
    work = [tensor(name, ports["loop_body"][name]) for name in ("hidden", "features", "feedback", "scales")]
    zeros = [
        tensor(NO_FEEDBACK, ports["loop_body"]["feedback"]),
        tensor(NO_SCALES, ports["loop_body"]["scales"]),
    ]
    latents = [tensor(name, ports["post"]["latent"]) for name in (*LATENTS, *PREDICTIONS)]
    rows = Tensor(COEFFICIENT_ROWS, (len(plan.steps), len(COEFFICIENTS)), "float32", by_row=True)
    tensors = {each.name: each for each in (*asked, rows, *latents, *tables, *work, *zeros)}

    cond = {port.name: View(port.name) for port in (*graphs[COND].inputs, *graphs[COND].outputs)}
    runs = [Run(COND, None, cond)]
    for index in range(len(plan.steps)):
        runs += _step(plan, index, {each.name: each.by_row for each in tables})
    given = (*(each.name for each in asked if each.name != "times"), COEFFICIENT_ROWS, LATENTS[0])
    seen = [Run(run.graph, run.step, {name: run.views[name] for name in ports[run.graph]}) for run in runs]
    return Route(plan, manifest.scales, tensors, given, constants, tuple(seen))


def _step(plan: StepPlan, index: int, tables: Mapping[str, bool]) -> list[Run]:
    step = plan.steps[index]

    def rows(time: float) -> dict[str, View]:
        row = plan.times.index(time)
        return {name: View(name, row if by_row else None) for name, by_row in tables.items()}

    here = {
        **{name: View(name) for name in ("hidden", "features", "feedback", "scales")},
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
    runs.append(("post", at_t_post if step.feedback else at_t))
    return [Run(graph, index, views) for graph, views in runs]
