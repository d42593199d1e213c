"""A row of a benchmark: what runs, where, and under which step plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from ilf_trt.contract.plan import StepPlan
from ilf_trt.errors import InvalidRequest, told


class Side(StrEnum):
    """The process that a row runs in."""

    TORCH = "torch"
    RUNTIME = "runtime"


class Rival(StrEnum):
    """What `--against` compares with, by its name on the command line."""

    EAGER = "eager"
    COMPILE = "compile"
    CACHE = "cache"
    CACHE_DIT = "cache-dit"
    ONNX = "onnx"
    ONE_GRAPH = "one-graph"

    @classmethod
    def parse_all(cls, text: str) -> "tuple[Rival, ...]":
        """`"eager,compile"` -> both, each once, eager first; raises InvalidRequest for another name."""
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in tuple(cls):
                raise InvalidRequest(f"--against names {told(name)}, it takes {', '.join(cls)}")
        rivals = tuple(rival for rival in cls if rival.value in names)
        return rivals if Rival.EAGER in rivals else (Rival.EAGER, *rivals)


class Boundary(StrEnum):
    """What is inside of a measured time.

    `denoise` begins with noise and embedded conditions and ends with latents. `end-to-end` begins with the request and
    ends with pixels, as far as the bundle has a text encoder and a decoder.
    """

    DENOISE = "denoise"
    END_TO_END = "end-to-end"


@dataclass(frozen=True, slots=True)
class Row:
    """One way to make a picture. `slug` is unique; `rival` is None for the bundle's own engines."""

    slug: str
    title: str
    side: Side
    plan: StepPlan
    rival: Rival | None = None
    ilf: bool = False
    """Whether a torch row runs the ILF model; others run diffusers' own."""


def rows_of(
    plain: StepPlan, equal: StepPlan, ilf: StepPlan, rivals: tuple[Rival, ...], front: Sequence[StepPlan] = ()
) -> tuple[Row, ...]:
    """The rows in their order: rivals first, for the first row is the base line; ILF never without equal cost.

    `front` are more plans for the engines; after one with feedback comes the plain plan of equal cost.
    """
    rows: list[Row] = []
    if Rival.EAGER in rivals:
        rows += [
            Row("eager", f"eager PyTorch, {len(plain.steps)} steps", Side.TORCH, plain, Rival.EAGER),
            Row("eager-equal", f"eager PyTorch, {len(equal.steps)} steps (equal cost)", Side.TORCH, equal, Rival.EAGER),
            Row("eager-ilf", f"eager PyTorch, ILF {len(ilf.steps)} steps", Side.TORCH, ilf, Rival.EAGER, ilf=True),
        ]
    if Rival.COMPILE in rivals:
        rows += [
            Row("compile", f"torch.compile, {len(plain.steps)} steps", Side.TORCH, plain, Rival.COMPILE),
            Row(
                "compile-equal",
                f"torch.compile, {len(equal.steps)} steps (equal cost)",
                Side.TORCH,
                equal,
                Rival.COMPILE,
            ),
            Row("compile-ilf", f"torch.compile, ILF {len(ilf.steps)} steps", Side.TORCH, ilf, Rival.COMPILE, ilf=True),
        ]
    if Rival.CACHE in rivals:
        rows.append(Row("cache", "eager, the paper's block cache", Side.TORCH, plain, Rival.CACHE))
    if Rival.CACHE_DIT in rivals:
        rows.append(Row("cache-dit", "eager, cache-dit", Side.TORCH, plain, Rival.CACHE_DIT))
    if Rival.ONNX in rivals:
        rows.append(Row("onnx", "ONNX Runtime, diffusers' own graph", Side.TORCH, plain, Rival.ONNX))
    if Rival.ONE_GRAPH in rivals:
        rows.append(Row("one-graph", "ONNX Runtime, one graph a step", Side.TORCH, plain, Rival.ONE_GRAPH))
    return (
        *rows,
        Row("plain", f"engines, {len(plain.steps)} steps", Side.RUNTIME, plain),
        Row("equal", f"engines, {len(equal.steps)} steps (equal cost)", Side.RUNTIME, equal),
        Row("ilf", f"engines, ILF {len(ilf.steps)} steps", Side.RUNTIME, ilf, ilf=True),
        *(_front_row(index, plan, front) for index, plan in enumerate(front)),
    )


def _front_row(index: int, plan: StepPlan, front: Sequence[StepPlan]) -> Row:
    """`plan-2`; with feedback `plan-2-ilf`, and the plain plan behind that one is `plan-2-equal`."""
    steps, feedback = len(plan.steps), any(step.feedback for step in plan.steps)
    if feedback:
        return Row(
            f"plan-{index}-ilf", f"engines, {steps} steps, feedback {plan.feedback}", Side.RUNTIME, plan, ilf=True
        )
    before = front[index - 1] if index else None
    if before is not None and any(step.feedback for step in before.steps):
        title = f"engines, {steps} steps (equal cost of the row before)"
        return Row(f"plan-{index - 1}-equal", title, Side.RUNTIME, plan)
    return Row(f"plan-{index}", f"engines, {steps} steps", Side.RUNTIME, plan)
