"""Trains the feedback block by Fast Approximate Distillation; the backbone stays frozen."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import isfinite, isnan
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ilf_trt.errors import InvalidRequest
from ilf_trt.model import ILFModel

LOG_EVERY = 50


class Teacher(StrEnum):
    """What the student is distilled from, besides the noise itself."""

    FAST = "fast"
    NONE = "none"


class SecondPass(StrEnum):
    """The time that the student's second pass is conditioned on while it trains."""

    SAME = "t"
    HALF = "t/2"


@dataclass(frozen=True, slots=True)
class Batch:
    """x0 (B, C, H, W) and the backbone's own arguments for B rows."""

    x0: Tensor
    call: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a feedback block is trained; every field changes the result."""

    iterations: int
    batch_size: int
    learning_rate: float
    scale_learning_rate: float
    weight_decay: float
    seed: int
    teacher: Teacher = Teacher.FAST
    second_pass: SecondPass = SecondPass.SAME


def train_feedback(
    model: ILFModel,
    batches: Iterator[Batch],
    alphas_cumprod: Tensor,
    recipe: Recipe,
    *,
    log: Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train `model.feedback` in place and return the training facts.

    The student sees x_t; the teacher is the same backbone without feedback on the same image and noise at t/2, once.
    Loss: MSE to the noise plus MSE to the teacher's prediction (digest of arXiv 2501.13107, section 3.2).
    `log` gets one JSON object a line; `progress` is called with the iteration and its loss.
    Raises InvalidRequest for fewer than one iteration, and when the loss is no longer finite.
    """
    if recipe.iterations < 1:
        raise InvalidRequest(f"iterations is {recipe.iterations}, it must be at least 1")
    torch.manual_seed(recipe.seed)
    channels = model.adapter.latent[0]
    optimizer = torch.optim.AdamW(
        [
            {"params": model.feedback.block.parameters(), "lr": recipe.learning_rate},
            {"params": [model.feedback.scales], "lr": recipe.scale_learning_rate, "weight_decay": 0.0},
        ],
        weight_decay=recipe.weight_decay,
    )
    lines = log.open("w") if log else None
    total = 0.0
    try:
        for iteration in range(1, recipe.iterations + 1):
            loss = _distillation_loss(model, next(batches), alphas_cumprod, recipe, channels)
            value = loss.item()
            if not isfinite(value):
                raise InvalidRequest(
                    f"loss is {'NaN' if isnan(value) else value} at iteration {iteration}; lower the learning rate"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += value
            if progress:
                progress(iteration, value)
            if lines and (iteration % LOG_EVERY == 0 or iteration == recipe.iterations):
                scales = model.feedback.scales.detach().tolist()
                lines.write(json.dumps({"iteration": iteration, "loss": value, "scales": scales}) + "\n")
                lines.flush()
    finally:
        if lines:
            lines.close()
    return {**asdict(recipe), "mean_loss": total / recipe.iterations}


def _distillation_loss(model: ILFModel, batch: Batch, alphas_cumprod: Tensor, recipe: Recipe, channels: int) -> Tensor:
    time = torch.randint(0, len(alphas_cumprod), (len(batch.x0),), device=batch.x0.device)
    noise = torch.randn_like(batch.x0)
    later = time if recipe.second_pass is SecondPass.SAME else time // 2
    student = model(noised(batch.x0, noise, time, alphas_cumprod), timestep=time, t_post=later, **batch.call)
    predicted = student.sample[:, :channels]
    loss = F.mse_loss(predicted, noise)
    if recipe.teacher is Teacher.FAST:
        half = time // 2
        with torch.no_grad():
            teacher = model(noised(batch.x0, noise, half, alphas_cumprod), timestep=half, feedback=False, **batch.call)
        loss = loss + F.mse_loss(predicted, teacher.sample[:, :channels])
    return loss


def noised(x0: Tensor, noise: Tensor, time: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x0 and noise (B, C, H, W), time (B,) -> x_t (B, C, H, W) of the variance-preserving diffusion."""
    kept = alphas_cumprod[time].reshape(-1, 1, 1, 1)
    return kept.sqrt() * x0 + (1 - kept).sqrt() * noise
