"""Eager generation in PyTorch with diffusers' own scheduler: what every served picture is held against."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ilf_trt.backbones import backbone_of
from ilf_trt.errors import InvalidRequest, UnsupportedScheduler
from ilf_trt.model import ILFModel
from ilf_trt.schedule import StepPlan


@torch.inference_mode()
def generate(
    model: ILFModel | nn.Module,
    plan: StepPlan,
    scheduler_config: Mapping[str, Any],
    conditions: Mapping[str, Tensor],
    noise: Tensor,
    *,
    guidance_scale: float,
    guidance: bool = True,
) -> Tensor:
    """noise (B, C, H, W) of unit variance -> latents (B, C, H, W).

    `model` is an ILF model, or a plain backbone when no step of the plan gets feedback (its own forward is then used).
    `conditions` bear the names of the served model's ports. Runs on the device and in the dtype of the model.
    """
    plain = not isinstance(model, ILFModel)
    if plain and any(step.feedback for step in plan.steps):
        raise InvalidRequest("a plain backbone cannot take feedback; pass an ILF model, or a plan with feedback none")
    adapter = model.adapter if isinstance(model, ILFModel) else backbone_of(model)
    parameter = next(model.parameters())
    call = adapter.call({name: value.to(parameter.device) for name, value in conditions.items()}, guidance=guidance)
    scheduler = scheduler_of(scheduler_config)
    scheduler.set_timesteps(plan.requested_steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    latents = noise.to(parameter.device) * scheduler.init_noise_sigma
    for step, timestep in zip(plan.steps, scheduler.timesteps, strict=True):
        seen = scheduler.scale_model_input(latents, timestep)
        rows = torch.cat([seen, seen]) if guidance else seen
        time = torch.full((len(rows),), step.t, device=parameter.device)
        feedback: dict[str, Any] = {} if plain else {"t_post": step.t_post, "feedback": step.feedback}
        output = model(rows.to(parameter.dtype), timestep=time, **feedback, **call).sample
        output = output[:, : adapter.latent[0]].float()
        if guidance:
            conditional, unconditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


@contextmanager
def placed(model: nn.Module, device: str) -> Iterator[None]:
    """`model` on `device` in whole float32 for the time of a block, and back on the CPU.

    Raises InvalidRequest when there is no such device.
    """
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidRequest(f"device {device!r} cannot be used ({reason}); pass --device cpu") from error
    try:
        # cuDNN's default for a float32 convolution is TF32, 10 bits: past the parity limit of FP32
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        model.to("cpu")


def scheduler_of(config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of a config; raises UnsupportedScheduler for a class that diffusers does not have."""
    name = str(config.get("_class_name"))
    scheduler_class = getattr(diffusers, name, None)
    if scheduler_class is None or not name.endswith("Scheduler"):
        raise UnsupportedScheduler(f"diffusers {diffusers.__version__} has no scheduler {name!r}; check the config")
    return scheduler_class.from_config(dict(config))
