"""A drop-in for the transformer of a diffusers pipeline: the pipeline stays as it is and samples with feedback."""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ilf_trt.contract.plan import DEFAULT_FEEDBACK, Ratio, Rule, StepPlan
from ilf_trt.errors import InvalidRequest
from ilf_trt.model.checkpoint import save_ilf
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.sampling import check_finite

from .follower import Follower, plan_maker
from .replaced import model_for, replaced_transformer


class ILFTransformer(ModelMixin):  # type: ignore[misc]
    """Called by a diffusers pipeline as its own transformer; each call runs the step that the scheduler is at.

    `config`, `dtype` and `device` are the backbone's, and so are all channels of what it returns. It is a ModelMixin
    because `save_pretrained` of a pipeline drops everything else.
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
        base_differs: bool = False,
    ) -> Self:
        """Put `model` in the place of `pipe.transformer`; every later call of `pipe` follows a plan of its own.

        The plan is that of `pipe.scheduler` and of the number of steps at the time of the call. `model` is moved to
        the device and dtype of the transformer that it replaces, if there is one. That transformer must have the
        weights of the model's base, or these rounded to a half: they are compared once, which reads all of them.
        `base_differs` takes a fine-tune of the base: the pipeline keeps its own weights and gets the feedback block.
        Raises InvalidRequest for a pipeline without a transformer, with another one than the model's or with one that
        carries an adapter (LoRA), and for an unknown pattern, rule or ratio. The pipeline's calls raise
        UnsupportedScheduler for a scheduler without a plan.
        """
        replaced = replaced_transformer(pipe, type(model.adapter), model.config)
        plan_of = plan_maker(len(model.adapter.blocks), model.loop, feedback, rule, ratio)
        transformer = cls(model_for(replaced, model, base_differs=base_differs), Follower(pipe, plan_of))
        if replaced is not None:
            nn.Module.to(transformer, replaced.device, replaced.dtype)
        pipe.transformer = transformer
        return transformer

    @property
    def base(self) -> nn.Module:
        """The frozen backbone."""
        return self.model.backbone

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

        Raises InvalidRequest for unknown arguments, and for a timestep that the scheduler is not at. The last step
        raises NonFinite if the sample holds NaN or infinity, of which diffusers would make a black picture.
        """
        call, t_post, feedback, last = self._step(hidden_states, args, conditions)
        output = self.model(hidden_states, t_post=t_post, feedback=feedback, return_dict=return_dict, **call)
        if last:
            self._check(output[0][:, : self.model.adapter.latent[0]])
        return output

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write the base as diffusers does, and the ILF checkpoint into the same folder.

        `DiffusionPipeline.save_pretrained` calls this. The pipeline's folder then loads in diffusers with the plain
        base, and `load_ilf(FOLDER / "transformer")` gives the model. Raises InvalidRequest for a base that carries an
        adapter (LoRA), or without safetensors.
        """
        if not safe_serialization or variant is not None:
            raise InvalidRequest("an ILF checkpoint reads its base from safetensors without a variant; save it as such")
        base: Any = self.base
        save_ilf(self.model, save_directory, base=".")
        base.save_pretrained(save_directory, max_shard_size=max_shard_size)
        pipe = self._follower.pipe
        if pipe is not None and getattr(pipe.transformer, "_orig_mod", pipe.transformer) is self:
            library = type(base).__module__
            root = library.split(".")[0]
            pipe.register_to_config(transformer=(root if root == "diffusers" else library, type(base).__name__))

    def compile(self, *args: Any, **options: Any) -> None:
        """`torch.compile` for what runs at each step; one graph for plain steps, one for steps with feedback."""
        self.model.compile(*args, **options)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step(
        self, hidden_states: Tensor, args: tuple[Any, ...], conditions: dict[str, Any]
    ) -> tuple[dict[str, Any], Tensor, bool, bool]:
        call = self.model.adapter.bind(args, conditions)
        plan, index = self._follower.at(call["timestep"])
        if self._followed is None or self._followed[0] is not plan:
            self._followed = plan, torch.tensor([step.t_post for step in plan.steps], device=hidden_states.device)
        return call, self._followed[1][index], plan.steps[index].feedback, index == len(plan.steps) - 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _check(self, sample: Tensor) -> None:
        check_finite(sample, self.dtype)
