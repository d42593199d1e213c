"""A drop-in for the transformer of a diffusers pipeline: the pipeline stays as it is and samples with feedback."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor, nn

from ilf_trt.contract import Loop
from ilf_trt.errors import InvalidRequest, UnsupportedScheduler
from ilf_trt.model import ILFModel
from ilf_trt.schedule import DEFAULT_FEEDBACK, Ratio, Rule, StepPlan, feedback_steps, make_plan

TIME_TOLERANCE = 0.01  # of 1000: some of diffusers' fractions come out of float32, times that differ do by 1 and more
MOST_STEPS = 1000
PlanMaker = Callable[[Mapping[str, object], int], StepPlan]


class ILFTransformer(nn.Module):
    """Called by a diffusers pipeline as its own transformer; each call runs the step that the scheduler is at.

    `config`, `dtype` and `device` are the backbone's, and so are all channels of what it returns.
    """

    def __init__(self, model: ILFModel, follower: "Follower") -> None:
        super().__init__()
        self.model = model
        self._follower = follower
        self._followed: tuple[StepPlan, Tensor] | None = None

    @classmethod
    def install(
        cls,
        pipe: Any,
        model: ILFModel,
        *,
        feedback: str = DEFAULT_FEEDBACK,
        rule: Rule | str = Rule.ANNEAL,
        ratio: Ratio | str = Ratio.LOOP_TO_MODEL,
    ) -> Self:
        """Put `model` in the place of `pipe.transformer`; every later call of `pipe` follows a plan of its own.

        The plan is that of `pipe.scheduler` and of the number of steps at the time of the call. `model` is moved to
        the device and dtype of the transformer that it replaces, if there is one.
        Raises InvalidRequest for a pipeline without a transformer or with another one than the model's, and for an
        unknown pattern, rule or ratio. The pipeline's calls raise UnsupportedScheduler for a scheduler without a plan.
        """
        replaced = check_pipeline(pipe, model.config)
        plan_of = plan_maker(len(model.adapter.blocks), model.loop, feedback, rule, ratio)
        transformer = cls(model, Follower(pipe, plan_of))
        if replaced is not None:
            transformer.to(replaced.device, replaced.dtype)
        pipe.transformer = transformer
        return transformer

    @property
    def config(self) -> Any:
        """The backbone's own configuration."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.backbone.parameters()).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.backbone.parameters()).device
        return device

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **conditions: Any) -> Any:
        """The backbone's own arguments, hidden_states (R, C, H, W) -> sample (R, C_out, H, W).

        Raises InvalidRequest for unknown arguments, and for a timestep that the scheduler is not at.
        """
        call, t_post, feedback = self._step(hidden_states, args, conditions)
        return self.model(hidden_states, t_post=t_post, feedback=feedback, return_dict=return_dict, **call)

    def compile(self, *args: Any, **options: Any) -> None:
        """`torch.compile` for what runs at each step; one graph for plain steps, one for steps with feedback."""
        self.model.compile(*args, **options)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step(
        self, hidden_states: Tensor, args: tuple[Any, ...], conditions: dict[str, Any]
    ) -> tuple[dict[str, Any], Tensor, bool]:
        call = self.model.adapter.bind(args, conditions)
        plan, index = self._follower.at(call["timestep"])
        if self._followed is None or self._followed[0] is not plan:
            self._followed = plan, torch.tensor([step.t_post for step in plan.steps], device=hidden_states.device)
        return call, self._followed[1][index], plan.steps[index].feedback


class Follower:
    """Knows which step of its plan a pipeline is at, by asking the pipeline's scheduler.

    A scheduler makes its timesteps anew for every run, and a plan is made with them. Where times may repeat a scheduler
    counts its steps; where it does not count, as DDIM, the time is looked up, which waits for a GPU.
    """

    def __init__(self, pipe: Any, plan_of: PlanMaker) -> None:
        """`plan_of` makes the plan of a scheduler config and a number of steps. The pipeline is not kept alive."""
        self._pipe = ref(pipe)
        self._plan_of = plan_of
        self._followed: tuple[Tensor, StepPlan] | None = None

    def at(self, timestep: Tensor | float) -> tuple[StepPlan, int]:
        """The plan of the scheduler's present timesteps, and the index of the step that comes next.

        Raises UnsupportedScheduler, and InvalidRequest when the scheduler has no step left or none at `timestep`.
        """
        pipe = self._pipe()
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
        got, wanted = scheduler.timesteps.tolist(), [step.t for step in plan.steps]
        if len(got) != len(wanted) or any(abs(a - b) > TIME_TOLERANCE for a, b in zip(got, wanted, strict=True)):
            raise UnsupportedScheduler(
                f"{name}: its {len(got)} timesteps {_few(got)} are not the {len(wanted)} that its config gives, "
                f"{_few(wanted)}; leave timesteps=… and sigmas=… out, and lambda_min_clipped at its default"
            )
        return plan


def check_pipeline(pipe: Any, config: Any) -> Any:
    """The transformer that `pipe` has, or None; raises InvalidRequest when there is no place for one of `config`."""
    for part in ("transformer", "scheduler"):
        if not hasattr(pipe, part):
            raise InvalidRequest(f"{type(pipe).__name__} has no {part}; give a DiT or PixArt pipeline")
    replaced = pipe.transformer
    if replaced is None:
        return None
    ours, theirs = dict(config), dict(replaced.config)
    for name in sorted((ours.keys() & theirs.keys()) - {"out_channels"}):  # a served model has no learned variance
        if not name.startswith("_") and ours[name] != theirs[name]:
            raise InvalidRequest(
                f"{type(pipe).__name__} has another transformer than the model's: its {name} is {theirs[name]!r}, the "
                f"model's {ours[name]!r}; load the pipeline of the model's base"
            )
    return replaced


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
    found = [index for index, step in enumerate(plan.steps) if abs(step.t - t) <= TIME_TOLERANCE]
    if not found:
        raise InvalidRequest(f"no step is at time {t:g}; the plan's are {_few([step.t for step in plan.steps])}")
    return found[:2][-1]


def _few(times: list[float]) -> str:
    shown = [f"{time:g}" for time in times]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:3], "…", shown[-1]])
