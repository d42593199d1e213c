"""The samplers of the study: fewer steps, caches, and feedback under every rule, pattern and training."""

from dataclasses import dataclass, replace
from enum import StrEnum

from ilf_trt.contract.plan import Ratio, Rule

RULES = (
    (Rule.NONE, Ratio.LOOP_TO_MODEL),
    (Rule.UNIFORM, Ratio.LOOP_TO_MODEL),
    (Rule.RESCALE, Ratio.LOOP_TO_MODEL),
    (Rule.RESCALE, Ratio.MODEL_TO_LOOP),
    (Rule.ANNEAL, Ratio.LOOP_TO_MODEL),
    (Rule.ANNEAL, Ratio.MODEL_TO_LOOP),
)
GUIDANCE = 1.5
TUNED, SMALL, NEAR, NEAR_LONG = "tuned", "small-lr", "near-200", "near-200-long"
SHORT = ("long/steps/00000750", "long/steps/00000375")  # the plain recipe, at the iterations of the changed ones


class Kind(StrEnum):
    """The kind of a sampler's steps."""

    PLAIN = "plain"
    CACHED = "cached"
    CACHE_DIT = "cache-dit"
    ILF = "ilf"


@dataclass(frozen=True, slots=True)
class Sampler:
    """One row of the study; `training` names the feedback block, `order` is the order of the solver.

    `noise_over` divides the prediction of the model: epsilon scaling (arXiv 2308.15321), which costs nothing.
    """

    part: str
    name: str
    kind: Kind
    steps: int
    feedback: str = "none"
    rule: Rule = Rule.NONE
    ratio: Ratio = Ratio.LOOP_TO_MODEL
    training: str = ""
    order: int = 2
    guidance_scale: float = 1.0
    noise_over: float = 1.0


def samplers() -> list[Sampler]:
    """All samplers of the study, the most important ones first."""
    main = [plain(steps) for steps in (50, 20, 12, 9)]  # the longest first: it is the reference of the others
    main += [_ilf("main", 10, "outer:2", Rule.ANNEAL, training=TUNED)]
    main += [_ilf("main", 7, "outer:2", Rule.ANNEAL, training=TUNED)]
    main += [Sampler("main", f"cache {steps}", Kind.CACHED, steps) for steps in (20, 14)]
    main += [_ilf("main", 10, "outer:2", Rule.ANNEAL, training=SMALL)]
    main += [_ilf("main", 7, "outer:2", Rule.ANNEAL, training=SMALL)]
    main += [Sampler("main", "cache-dit 20", Kind.CACHE_DIT, 20)]
    main += [plain(steps) for steps in (16, 10, 8, 6)]
    plans = ((10, "last:4"), (7, "last:4"), (11, "outer:1"), (9, "outer:3"))
    plans += ((8, "all"), (8, "outer:1"), (6, "all"), (5, "outer:2"))
    main += [_ilf("main", steps, feedback, Rule.ANNEAL, training=TUNED) for steps, feedback in plans]
    main += [_ilf("main", steps, "all", Rule.ANNEAL, training=name) for name in (NEAR, NEAR_LONG) for steps in (8, 6)]
    main += [_interval(steps) for steps in (8, 6)]
    parts = (_smaller_noise, _controls, _guided_samplers, _rules, _patterns, _trainings, _early, _duration)
    return [*main, *(sampler for part in parts for sampler in part())]


def plain(steps: int) -> Sampler:
    """A plain sampler: every block runs once a step."""
    return Sampler("main", f"plain {steps}", Kind.PLAIN, steps)


def with_guidance(sampler: Sampler, scale: float) -> Sampler:
    """The same sampler with guidance; a scale of 1 means no guidance."""
    if scale == 1:
        return sampler
    return replace(sampler, part="guided", name=f"{sampler.name}, guidance {scale}", guidance_scale=scale)


def _smaller_noise() -> list[Sampler]:
    """The rival without training: plain steps with a slightly smaller predicted noise."""
    return [
        replace(plain(steps), part="scaled", name=f"plain {steps}, noise / {over}", noise_over=over)
        for steps in (12, 9, 20)
        for over in (1.005, 1.01, 1.02, 1.04, 1.08)
    ]


def _controls() -> list[Sampler]:
    """The shift of t_post alone, the trained block alone, and both with many steps.

    An untrained block adds nothing: only the time of the later blocks differs from plain steps then.
    """
    shift = [
        Sampler("controls", f"shift only {steps} outer:2 anneal m/n", Kind.ILF, steps, "outer:2", Rule.ANNEAL)
        for steps in (10, 7)
    ]
    block = ((10, "outer:2"), (10, "last:4"), (8, "all"), (7, "outer:2"), (6, "all"), (20, "outer:2"))
    return [
        *shift,
        *(_ilf("controls", steps, feedback, Rule.NONE, training=TUNED) for steps, feedback in block),
        _ilf("controls", 20, "outer:2", Rule.ANNEAL, training=TUNED),
    ]


def _guided_samplers() -> list[Sampler]:
    """The most important samplers with guidance; each of their block forwards runs on two rows a picture."""
    plans = ((10, "outer:2"), (7, "outer:2"), (10, "last:4"), (7, "last:4"))
    with_feedback = [_ilf("guided", steps, feedback, Rule.ANNEAL, training=TUNED) for steps, feedback in plans]
    return [with_guidance(sampler, GUIDANCE) for sampler in (*map(plain, (20, 12, 9)), *with_feedback)]


def _rules() -> list[Sampler]:
    """Rules and ratios, for a second pass trained at t and at t/2."""
    return [
        _ilf("rules", steps, "outer:2", rule, ratio, training=training)
        for training in (*SHORT, "half")
        for steps in (10, 7)
        for rule, ratio in RULES
    ]


def _patterns() -> list[Sampler]:
    """Patterns of feedback (figure 10): on 10 steps, then on the last of fewer steps for the same block forwards."""
    patterns = ("first:4", "last:4", "3,4,5,6", "alternate", "inner:2", "all")
    last = ((11, "last:2"), (9, "last:6"), (8, "last:2"))
    chosen = (*((10, pattern) for pattern in patterns), *last)
    return [_ilf("patterns", steps, pattern, Rule.ANNEAL, training=TUNED) for steps, pattern in chosen]


def _trainings() -> list[Sampler]:
    """Trainings that differ in one setting: losses (figure 11), initialisations, and loops (table 3)."""
    losses = (*SHORT, "none", "standard", "standard-2", "near", NEAR, "near-2", "distillation", "quarter")
    loops = ("loop-0-4", "loop-7-11", "loop-4-6", "loop-2-9")
    return [_ilf("trainings", 10, "outer:2", Rule.ANNEAL, training=name) for name in (*losses, "begin", "zero", *loops)]


def _early() -> list[Sampler]:
    """The effect of each loss on early and late steps: feedback on the first four, the last four, and all."""
    plans = ((10, "first:4"), (10, "last:4"), (8, "all"), (7, "last:4"), (6, "all"))
    return [
        _ilf("early", steps, pattern, Rule.ANNEAL, training=name)
        for name in (*SHORT, "none", "standard-2", "near", NEAR, NEAR_LONG, "near-2", "quarter")
        for steps, pattern in plans
    ]


def _duration() -> list[Sampler]:
    """Quality over the iterations of a training (figure 8)."""
    marks = (375, 750, 1125, 1500, 2250, 3000, 3750)
    return [_ilf("duration", 10, "outer:2", Rule.ANNEAL, training=f"long/steps/{mark:08d}") for mark in marks]


def _ilf(
    part: str,
    steps: int,
    feedback: str,
    rule: Rule,
    ratio: Ratio = Ratio.LOOP_TO_MODEL,
    *,
    training: str,
) -> Sampler:
    name = f"ILF {steps} {feedback} {rule}" + ("" if rule in (Rule.NONE, Rule.UNIFORM) else f" {ratio}")
    return Sampler(part, name, Kind.ILF, steps, feedback, rule, ratio, training)


def _interval(steps: int) -> Sampler:
    """A block trained on whole intervals: feedback on all steps, with a solver of first order."""
    name = f"ILF {steps} all rescale m/n, first order"
    return Sampler("main", name, Kind.ILF, steps, "all", Rule.RESCALE, training="interval", order=1)
