"""The step plan: for every step its time, the time after feedback, whether it gets feedback, and the solver's row."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ilf_trt.errors import InvalidRequest, UnsupportedScheduler, one_line, shown

from .arrays import is_digits
from .document import DocumentError, Size, as_type, read_json
from .solver import DEFAULT_SCHEDULER, MOST_STEPS, MOST_TIMES, table_from_scheduler
from .spec import Loop

LARGEST = 3.4028234e38  # of float32, in which a session computes

ANNEAL_FLOOR = 10.0
NAME_CHARS = 80
DEFAULT_FEEDBACK = "outer:2"
SCHEDULERS: dict[str, dict[str, Any]] = {
    "dpmsolver++": dict(DEFAULT_SCHEDULER),
    "ddim": {"_class_name": "DDIMScheduler", "clip_sample": False},
    "euler": {"_class_name": "EulerDiscreteScheduler"},
}


class Rule(StrEnum):
    """How far past t the network is conditioned after feedback; i is the distance to the next step's time.

    uniform: t - i/2. rescale: t - i * ratio (paper Eq. 4). anneal: Eq. 4 on the first step, then
    t - max(i * ratio * t/1000, 10) (Eq. 5). none: t.
    """

    NONE = "none"
    UNIFORM = "uniform"
    RESCALE = "rescale"
    ANNEAL = "anneal"


class Ratio(StrEnum):
    """The weight of the loop's size in a rule: m/n stays between two steps, n/m is the letter of the paper."""

    LOOP_TO_MODEL = "m/n"
    MODEL_TO_LOOP = "n/m"

    def of(self, loop: Loop, blocks: int) -> float:
        share = loop.size / blocks
        return share if self is Ratio.LOOP_TO_MODEL else 1 / share


@dataclass(frozen=True, slots=True)
class Step:
    """One solver step; `solver` is its row c_x, c_out, a, b_0, b_1, b_2 (see `SolverTable`)."""

    t: float
    t_post: float
    feedback: bool
    block_forwards: Size
    solver: tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A whole trajectory as data: it can be replaced at run time without touching a graph.

    `requested_steps` is what the scheduler was asked for; a few of its options make fewer.
    """

    blocks: Size
    loop: Loop
    feedback: str
    rule: Rule
    ratio: Ratio
    initial_scale: float
    requested_steps: Size
    steps: tuple[Step, ...]

    @property
    def block_forwards(self) -> int:
        """Blocks run over the whole trajectory, the paper's cost."""
        return sum(step.block_forwards for step in self.steps)

    @property
    def equal_steps(self) -> int:
        """Steps of the plain trajectory with as many block forwards, to the nearest step."""
        return round(self.block_forwards / self.blocks)

    @property
    def times(self) -> tuple[float, ...]:
        """Every time that the network is conditioned on, once, descending."""
        return tuple(sorted({time for step in self.steps for time in (step.t, step.t_post)}, reverse=True))

    def as_json(self) -> dict[str, Any]:
        """Plain data; `StepPlan.from_json` reads it back."""
        return {
            "blocks": self.blocks,
            "loop": [self.loop.begin, self.loop.end],
            "feedback": self.feedback,
            "rule": self.rule.value,
            "ratio": self.ratio.value,
            "initial_scale": self.initial_scale,
            "requested_steps": self.requested_steps,
            "block_forwards": self.block_forwards,
            "steps": [
                {
                    "t": step.t,
                    "t_post": step.t_post,
                    "feedback": step.feedback,
                    "block_forwards": step.block_forwards,
                    "solver": list(step.solver),
                }
                for step in self.steps
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StepPlan":
        """Raises InvalidRequest when a field is missing, of the wrong type or out of its range."""
        try:
            fields = {name: value for name, value in data.items() if name != "block_forwards"}
            if isinstance(data.get("loop"), list):
                fields["loop"] = dict(zip(("begin", "end"), data["loop"], strict=True))
            plan = as_type(fields, cls)
            plan.check()
        except (TypeError, ValueError, AttributeError) as error:
            reason = one_line(error)
            raise InvalidRequest(f"step plan: {reason}; make one with ilf-trt plan --json") from error
        if data.get("block_forwards", plan.block_forwards) != plan.block_forwards:
            raise InvalidRequest(
                f"step plan: block_forwards is {shown(str(data['block_forwards']), 40)}, its steps have "
                f"{plan.block_forwards}; make one with ilf-trt plan --json"
            )
        return plan

    def check(self) -> None:
        """Raise InvalidRequest for steps that no plan has: none, too many, or numbers that float32 cannot hold."""
        if not 1 <= len(self.steps) <= MOST_STEPS:
            raise InvalidRequest(f"{len(self.steps)} steps, expected 1 to {MOST_STEPS}")
        self.loop.check(self.blocks)
        numbers = (self.initial_scale, *(n for step in self.steps for n in (step.t, step.t_post, *step.solver)))
        if not all(abs(number) <= LARGEST for number in numbers):
            raise InvalidRequest("a number that is not finite, or too large for float32")
        for step in self.steps:
            if not (0 <= step.t <= MOST_TIMES and 0 <= step.t_post <= MOST_TIMES):
                raise InvalidRequest(f"a step at time {step.t} and {step.t_post}, expected 0 to {MOST_TIMES}")
            if step.block_forwards != self.blocks + (self.loop.size + 1 if step.feedback else 0):
                raise InvalidRequest(f"a step of {step.block_forwards} block forwards, which its loop does not have")


def make_plan(
    scheduler: Mapping[str, object],
    steps: int,
    *,
    blocks: int,
    loop: Loop,
    feedback: str = DEFAULT_FEEDBACK,
    rule: Rule = Rule.ANNEAL,
    ratio: Ratio = Ratio.LOOP_TO_MODEL,
) -> StepPlan:
    """The plan of `steps` steps of a diffusers scheduler config.

    Raises InvalidRequest for a loop or pattern that does not fit, UnsupportedScheduler for the scheduler or its steps.
    """
    loop.check(blocks)
    table = table_from_scheduler(scheduler, steps)
    fed = feedback_steps(feedback, len(table.times))
    scale = ratio.of(loop, blocks)
    horizon = float(_train_timesteps(scheduler) - 1)
    rows = []
    for index, (t, following) in enumerate(zip(table.times, (*table.times[1:], 0.0), strict=True)):
        offset = _offset(rule, t - following, scale, t, horizon + 1, first=index == 0) if fed[index] else 0.0
        c_x, c_out, a, b_0, b_1, b_2 = table.coefficients[index].tolist()
        rows.append(
            Step(
                t=t,
                t_post=min(max(t - offset, 0.0), horizon),
                feedback=fed[index],
                block_forwards=blocks + (loop.size + 1 if fed[index] else 0),
                solver=(c_x, c_out, a, b_0, b_1, b_2),
            )
        )
    return StepPlan(blocks, loop, feedback, rule, ratio, table.initial_scale, steps, tuple(rows))


def read_scheduler(name: str) -> dict[str, Any]:
    """A scheduler config by short name, or from a diffusers scheduler_config.json; raises UnsupportedScheduler."""
    if name in SCHEDULERS:
        return dict(SCHEDULERS[name])
    try:
        return read_json(name, foreign=True)
    except DocumentError as error:
        raise UnsupportedScheduler(
            f"scheduler {shown(name, NAME_CHARS)!r} is none of {', '.join(SCHEDULERS)}, and no scheduler_config.json: "
            f"it {error.reason}"
        ) from error


def feedback_steps(pattern: str, steps: int) -> tuple[bool, ...]:
    """Which of `steps` steps get feedback.

    `all`, `none`, `alternate` (0, 2, 4 …), `first:K`, `last:K`, `outer:K` (the first and the last K),
    `inner:K` (all but those), or step numbers `0,1,8,9`. Raises InvalidRequest.
    """
    name, _, argument = pattern.partition(":")
    if not argument and name in ("all", "none", "alternate"):
        return tuple(name == "all" or (name == "alternate" and index % 2 == 0) for index in range(steps))
    if name in ("first", "last", "outer", "inner") and is_digits(argument):
        count = int(argument)
        first = [index < count for index in range(steps)]
        last = [index >= steps - count for index in range(steps)]
        outer = [a or b for a, b in zip(first, last, strict=True)]
        return tuple({"first": first, "last": last, "outer": outer, "inner": [not value for value in outer]}[name])
    numbers = pattern.split(",")
    if all(is_digits(number.strip()) for number in numbers):
        chosen = {int(number) for number in numbers}
        if max(chosen) >= steps:
            raise InvalidRequest(f"feedback step {max(chosen)} does not exist; {steps} steps are 0 to {steps - 1}")
        return tuple(index in chosen for index in range(steps))
    raise InvalidRequest(
        f"feedback pattern {pattern!r} is unknown; give all, none, alternate, first:K, last:K, outer:K, inner:K "
        "or step numbers such as 0,1,8,9"
    )


def cached_block_forwards(blocks: int, steps: int, *, cached: int, every: int) -> tuple[int, ...]:
    """Cost of each step of the paper's caching baseline: the middle `cached` blocks run again every `every`-th step."""
    if not (0 <= cached <= blocks and every >= 1):
        raise InvalidRequest(
            f"cache of {cached} blocks every {every} steps does not fit; 0 to {blocks} blocks, every >= 1"
        )
    return tuple(blocks if index % every == 0 else blocks - cached for index in range(steps))


def _offset(rule: Rule, gap: float, scale: float, t: float, train_timesteps: float, *, first: bool) -> float:
    if rule is Rule.NONE:
        return 0.0
    if rule is Rule.UNIFORM:
        return gap / 2
    if rule is Rule.RESCALE or first:
        return gap * scale
    return max(gap * scale * t / train_timesteps, ANNEAL_FLOOR)


def _train_timesteps(scheduler: Mapping[str, object]) -> int:
    value = scheduler.get("num_train_timesteps", 1000)
    if not isinstance(value, int):
        raise InvalidRequest(f"num_train_timesteps is {value!r}, expected an integer")
    return value
