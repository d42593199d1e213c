"""Inner loop feedback inside a pipeline of diffusers that knows nothing of it: `pipe.transformer` is replaced."""

from collections.abc import Callable
from copy import copy
from functools import wraps
from typing import Any, Self

import torch
from torch import Tensor, nn

from ilf_trt.errors import InvalidRequest
from ilf_trt.model import ILFModel
from ilf_trt.schedule import DEFAULT_FEEDBACK, Ratio, Rule, Step, StepPlan, make_plan

SAME_TIME = 1e-3  # of 1,000; a scheduler may keep its times in half precision


class StepByStep(nn.Module):
    """What takes a transformer's place in a pipeline: it knows which step of the plan a call is.

    The pipeline's scheduler tells when a trajectory begins, and how many steps it has; every call is its next step.
    """

    def __init__(self, plan_of: Callable[[dict[str, Any], int], StepPlan]) -> None:
        """`plan_of` makes the plan of a scheduler's config and a number of steps."""
        super().__init__()
        self._plan_of = plan_of
        self.plan: StepPlan | None = None
        self._done = 0

    def replace_in(self, pipe: Any) -> None:
        """Take the place of `pipe.transformer`, and watch a copy of `pipe.scheduler`.

        Raises UnsupportedScheduler at once for a scheduler that a plan cannot be made of.
        """
        self._plan_of(_config(pipe.scheduler), 2)
        pipe.scheduler = self._watched(pipe.scheduler)
        pipe.transformer = self

    def _watched(self, scheduler: Any) -> Any:
        watched, set_timesteps = copy(scheduler), scheduler.set_timesteps

        @wraps(set_timesteps)
        def planned(*args: Any, **options: Any) -> None:
            type(scheduler).set_timesteps(watched, *args, **options)
            self.begin(self._plan_of(_config(watched), int(watched.num_inference_steps)))

        watched.set_timesteps = planned
        return watched

    def begin(self, plan: StepPlan) -> None:
        """The next call is the first step of `plan`."""
        self.plan, self._done = plan, 0

    def next_step(self, timestep: Any) -> tuple[int, Step]:
        """The number of this call's step, and the step; raises InvalidRequest when it is at another time."""
        if self.plan is None:
            raise InvalidRequest(
                "no plan is made yet; call scheduler.set_timesteps of the pipeline's own scheduler first"
            )
        index = self._done % len(self.plan.steps)
        step = self.plan.steps[index]
        if not isinstance(timestep, Tensor) or timestep.device.type == "cpu":  # on a GPU it would wait
            asked = float(torch.as_tensor(timestep).flatten()[0])
            if abs(asked - step.t) > SAME_TIME:
                raise InvalidRequest(
                    f"step {index} of the plan is at {step.t:g}, the pipeline asks for {asked:g}; use a pipeline that "
                    "calls its transformer once a step"
                )
        self._done += 1
        return index, step


class ILFTransformer(StepByStep):
    """An ILF model in eager PyTorch as a pipeline's transformer; `model.compile()` compiles what is inside.

    ILFTransformer.install(pipe, load_ilf("checkpoint"), feedback="outer:2")
    pipe("a red fox", num_inference_steps=10)
    """

    def __init__(
        self,
        model: ILFModel,
        *,
        feedback: str = DEFAULT_FEEDBACK,
        rule: Rule = Rule.ANNEAL,
        ratio: Ratio = Ratio.LOOP_TO_MODEL,
    ) -> None:
        def plan_of(config: dict[str, Any], steps: int) -> StepPlan:
            blocks = len(model.adapter.blocks)
            return make_plan(config, steps, blocks=blocks, loop=model.loop, feedback=feedback, rule=rule, ratio=ratio)

        super().__init__(plan_of)
        self.model = model
        self.config = model.config
        self._later: Tensor | None = None

    @classmethod
    def install(cls, pipe: Any, model: ILFModel, **options: Any) -> Self:
        """Put an ILF model in the place of `pipe.transformer`; `options` are those of the class.

        The pipeline goes on as it was, for any number of steps. Raises UnsupportedScheduler, InvalidRequest.
        """
        made = cls(model, **options)
        made.replace_in(pipe)
        return made

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def begin(self, plan: StepPlan) -> None:
        super().begin(plan)
        self._later = torch.tensor([step.t_post for step in plan.steps], device=self.device)

    def compile(self, **options: Any) -> None:
        """torch.compile of the model inside, once for plain steps and once for those with feedback."""
        self.model.compile(**{"fullgraph": True, "dynamic": False, **options})

    def forward(self, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        """As the backbone's own forward, at the plan's next step."""
        call = self.model.adapter.bind(args, {name: v for name, v in given.items() if name != "return_dict"})
        index, step = self.next_step(call["timestep"])
        later = None if self._later is None else self._later[index]
        return self.model(
            hidden_states, t_post=later, feedback=step.feedback, return_dict=given.get("return_dict", True), **call
        )


def _config(scheduler: Any) -> dict[str, Any]:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}
