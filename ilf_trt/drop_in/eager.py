"""A drop-in for the transformer of a diffusers pipeline: the pipeline stays as it is and samples with feedback."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from ilf_trt.contract.plan import DEFAULT_FEEDBACK, Ratio, Rule, StepPlan
from ilf_trt.model.ilf_model import ILFModel

from .follower import Follower, check_pipeline, plan_maker


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
