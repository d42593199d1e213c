"""Sampling in PyTorch with diffusers' own scheduler, eager or compiled: the reference for every served picture."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import diffusers
import torch
from torch import Tensor, nn

from ilf_trt.contract.guidance import OFF, effective_scale
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.ports import Role
from ilf_trt.errors import InvalidRequest, NonFinite, UnsupportedScheduler

from .backbones import backbone_of
from .ilf_model import ILFModel

M = TypeVar("M", bound=nn.Module)


class CompileMode(StrEnum):
    """torch.compile's modes; the last two replay CUDA graphs, the last also times kernels for many minutes."""

    DEFAULT = "default"
    REDUCE_OVERHEAD = "reduce-overhead"
    MAX_AUTOTUNE = "max-autotune"


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """How `inference_copy` compiles; `backend` is torch.compile's, a name or a callable."""

    mode: CompileMode = CompileMode.REDUCE_OVERHEAD
    backend: str | Callable[..., Any] = "inductor"


def inference_copy(model: M, *, device: str, dtype: torch.dtype, compiled: CompileOptions | None = None) -> M:
    """A copy of an ILF model or a plain backbone for `sample`, on `device` in `dtype`; `model` stays as it is.

    `compiled` compiles the whole forward at its first run: one graph for plain steps, and for an ILF model one for
    steps with feedback; neither is compiled again while batch and shapes stay. It must trace without a break. Block by
    block would compile sooner, but each step would then launch every block, and the embeddings and the head in pieces,
    from Python, which is what a small batch waits for; whole, a step is one replay of a CUDA graph.
    Raises InvalidRequest when there is no such device.
    """
    copy = deepcopy(model).eval()
    nn.Module.to(copy, dtype)  # diffusers' own warns of modules to keep in float32, of which these models have none
    _move(copy, device)
    if compiled is not None:
        copy.compile(backend=compiled.backend, mode=compiled.mode.value, fullgraph=True, dynamic=False)
    return copy


@torch.inference_mode()
def sample(
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
    `conditions` bear the names of the served model's ports. A `guidance_scale` of 1 or below is no guidance, as in
    diffusers. Runs on the device and in the dtype of the model, in
    float32 outside of it. Between the first step and the last, nothing waits for a GPU and nothing is copied to it.
    Raises NonFinite if the latents hold NaN or infinity at the end.
    """
    plain = not isinstance(model, ILFModel)
    if plain and any(step.feedback for step in plan.steps):
        raise InvalidRequest("a plain backbone cannot take feedback; pass an ILF model, or a plan with feedback none")
    scale = effective_scale(guidance_scale)
    guidance = guidance and scale > OFF
    adapter = model.adapter if isinstance(model, ILFModel) else backbone_of(model)
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    conditioning = adapter.conditioning(1)
    text = {port.name for port in conditioning.ports(guidance=True) if port.role is Role.TEXT}
    values = {name: v.to(device, dtype if name in text else v.dtype) for name, v in conditions.items()}
    call = adapter.call(conditioning.rows(values, guided=guidance, join=_cat))
    scheduler = scheduler_of(scheduler_config)
    scheduler.set_timesteps(plan.requested_steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    latents = noise.to(device) * scheduler.init_noise_sigma
    rows = len(latents) * (2 if guidance else 1)
    times = torch.tensor([[step.t] * rows for step in plan.steps]).to(device)  # (S, R)
    later = torch.tensor([step.t_post for step in plan.steps]).to(device)  # (S,); a float would be compiled in
    with _whole_float32():
        for index, (step, timestep) in enumerate(zip(plan.steps, scheduler.timesteps, strict=True)):
            scaled = scheduler.scale_model_input(latents, timestep).to(dtype)
            feedback: dict[str, Any] = {} if plain else {"t_post": later[index], "feedback": step.feedback}
            output = model(torch.cat([scaled] * 2) if guidance else scaled, timestep=times[index], **feedback, **call)
            # a copy even in float32: the next replay of a CUDA graph overwrites what the model gave
            epsilon = output.sample[:, : adapter.latent[0]].to(torch.float32, copy=True)
            del output
            if guidance:
                conditional, unconditional = epsilon.chunk(2)
                epsilon = unconditional + scale * (conditional - unconditional)
            latents = scheduler.step(epsilon, timestep, latents).prev_sample
    check_finite(latents, dtype)
    return latents


def check_finite(output: Tensor, dtype: torch.dtype) -> None:
    """Raise NonFinite if what a model gave in `dtype` holds NaN or infinity; waits for the GPU."""
    if not bool(output.isfinite().all()):
        name = str(dtype).removeprefix("torch.")
        wider = "a wider dtype, or " if dtype is not torch.float32 else ""
        raise NonFinite(
            f"the model gave NaN or infinity in {name}; use {wider}a smaller guidance_scale, and check its weights"
        )


@contextmanager
def move_to(model: nn.Module, device: str) -> Iterator[None]:
    """`model` on `device` in whole float32 for the time of a block, and back on the CPU.

    Raises InvalidRequest when there is no such device.
    """
    _move(model, device)
    try:
        with _whole_float32():
            yield
    finally:
        model.to("cpu")


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors))


def scheduler_of(config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of a config; raises UnsupportedScheduler for a class that diffusers does not have."""
    name = str(config.get("_class_name"))
    scheduler_class = getattr(diffusers, name, None)
    if scheduler_class is None or not name.endswith("Scheduler"):
        raise UnsupportedScheduler(f"diffusers {diffusers.__version__} has no scheduler {name!r}; check the config")
    return scheduler_class.from_config(dict(config))


def _move(model: nn.Module, device: str) -> None:
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidRequest(f"device {device!r} cannot be used ({reason}); pass --device cpu") from error


@contextmanager
def _whole_float32() -> Iterator[None]:
    """cuDNN's default for a float32 convolution is TF32, 10 bits: past the parity limit of FP32."""
    with torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled,
        benchmark=torch.backends.cudnn.benchmark,
        deterministic=torch.backends.cudnn.deterministic,
        allow_tf32=False,
    ):
        yield
