"""The follower: knows which step of its plan an unchanged diffusers pipeline is at."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ilf_trt.contract.plan import Ratio, Rule, StepPlan, feedback_steps, make_plan
from ilf_trt.contract.spec import Loop
from ilf_trt.errors import InvalidRequest, UnsupportedScheduler

TIME_TOLERANCE = 0.01  # of 1000: some of diffusers' fractions come out of float32, times that differ do by 1 and more


MOST_STEPS = 1000


PlanMaker = Callable[[Mapping[str, object], int], StepPlan]


class Follower:
    """Knows which step of its plan a pipeline is at, by asking the pipeline's scheduler.

    A scheduler makes its timesteps again for every run; a plan is made with them. Most schedulers count their steps.
    For one that does not, such as DDIM, the follower looks the time up, which waits for the GPU.
    """

    def __init__(self, pipe: Any, plan_of: PlanMaker) -> None:
        """`plan_of` makes the plan of a scheduler config and a number of steps. The pipeline is not kept alive."""
        self._pipe = ref(pipe)
        self._plan_of = plan_of
        self._followed: tuple[Tensor, StepPlan] | None = None

    @property
    def pipe(self) -> Any:
        """The pipeline that is followed; None when it is gone."""
        return self._pipe()

    def at(self, timestep: Tensor | float) -> tuple[StepPlan, int]:
        """The plan of the scheduler's present timesteps, and the index of the step that comes next.

        Raises UnsupportedScheduler, and InvalidRequest when the scheduler has no step left or none at `timestep`.
        """
        pipe = self.pipe
        if pipe is None:
            raise InvalidRequest("the pipeline of this transformer is gone; install the model in the one that is used")
        scheduler = pipe.scheduler
        if self._followed is None or self._followed[0] is not scheduler.timesteps:
            self._followed = scheduler.timesteps, self._plan(scheduler)
        plan = self._followed[1]
        index = getattr(scheduler, "step_index", None)
        if index is None:
            index = getattr(scheduler, "begin_index", None)
        if index is None:
            index = _index(plan, timestep)
        if index >= len(plan.steps):
            raise InvalidRequest(f"the scheduler has taken all its {index} steps; call its set_timesteps first")
        return plan, index

    def _plan(self, scheduler: Any) -> StepPlan:
        name, steps = type(scheduler).__name__, scheduler.num_inference_steps
        if steps is None:
            raise InvalidRequest(f"the pipeline's {name} has no timesteps yet; call its set_timesteps first")
        plan = self._plan_of({**scheduler.config, "_class_name": name}, steps)
        own, planned = scheduler.timesteps.tolist(), [step.t for step in plan.steps]
        if len(own) != len(planned) or any(abs(a - b) > TIME_TOLERANCE for a, b in zip(own, planned, strict=True)):
            raise UnsupportedScheduler(
                f"{name}: its {len(own)} timesteps {_shorten(own)} are not the {len(planned)} that its config gives, "
                f"{_shorten(planned)}; leave timesteps=… and sigmas=… out, and lambda_min_clipped at its default"
            )
        return plan


def plan_maker(blocks: int, loop: Loop, feedback: str, rule: Rule | str, ratio: Ratio | str) -> PlanMaker:
    """Makes plans of a scheduler config and a number of steps; raises InvalidRequest for what no plan could have."""
    try:
        rule, ratio = Rule(rule), Ratio(ratio)
    except ValueError as error:
        raise InvalidRequest(f"{error}; rules are {', '.join(Rule)}, ratios {', '.join(Ratio)}") from error
    feedback_steps(feedback, MOST_STEPS)
    return partial(make_plan, blocks=blocks, loop=loop, feedback=feedback, rule=rule, ratio=ratio)


def _index(plan: StepPlan, timestep: Tensor | float) -> int:
    """The step at a time; of a repeated one the second, at which diffusers begins."""
    t = float(torch.as_tensor(timestep).flatten()[0])
    indices = [index for index, step in enumerate(plan.steps) if abs(step.t - t) <= TIME_TOLERANCE]
    if not indices:
        raise InvalidRequest(f"no step is at time {t:g}; the plan's are {_shorten([step.t for step in plan.steps])}")
    return indices[:2][-1]


def _shorten(times: list[float]) -> str:
    words = [f"{time:g}" for time in times]
    return ", ".join(words if len(words) <= 4 else [*words[:3], "…", words[-1]])
