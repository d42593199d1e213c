"""NaN and infinity: the error that says which graph and step they come from, and what to do."""

from ilf_trt.contract.ports import DECODE, TEXT
from ilf_trt.contract.spec import Precision
from ilf_trt.errors import NonFinite

from .route import Route, Run

PRECISION_OPTIONS = {TEXT: "--text-precision", DECODE: "--decoder-precision"}
LARGE_GUIDANCE = 100.0  # pictures are made with 1 to 20; past this, the guidance itself is the first suspect
UNSTEADY = "a second run gave finite numbers, so check the memory of this machine and of its GPU"


def remedy(graph: str, precision: Precision, *, wide_residual: bool = False) -> str:
    """What to do if `graph`, built in `precision`, gives NaN or infinity."""
    if precision is Precision.FP32:
        return "it runs in float32 already, so look for numbers that are too large in its weights and in the request"
    if graph in PRECISION_OPTIONS:
        return f"build with {PRECISION_OPTIONS[graph]} fp32"
    if precision is Precision.BF16:
        return "build with --precision fp32"
    return f"build with {'' if wide_residual else '--residual fp32, or with '}--precision bf16 or fp32"


def error_of_run(run: Run, route: Route, guidance_scale: float) -> NonFinite:
    """The error for a trajectory in which `run` was the first to give NaN or infinity."""
    where = f"before the first of {len(route.plan.steps)} steps"
    advice = remedy(run.graph, route.precision, wide_residual=route.wide_residual)
    if run.step is not None:
        where = f"in {_step(route, run.step)}"
        if abs(guidance_scale) > LARGE_GUIDANCE:
            where, advice = f"{where}, with guidance_scale {guidance_scale:g}", "pass a smaller guidance_scale"
    return NonFinite(f"graph {run.graph} gave NaN or infinity {where}; {advice}")


def unsteady_error(route: Route, step: int) -> NonFinite:
    """The error for latents that are not finite after `step`, though no graph is to blame."""
    return NonFinite(f"the latents held NaN or infinity after {_step(route, step)}, but {UNSTEADY}")


def _step(route: Route, step: int) -> str:
    return f"step {step + 1} of {len(route.plan.steps)} (t = {route.plan.steps[step].t:g})"
