"""The weights of a training: the model that trains, its running mean, and the optimizer of F and s."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ilf_trt.model.backbones import backbone_of
from ilf_trt.model.ilf_model import ILFModel

from .recipe import Recipe


def training_model(model: ILFModel, dtype: torch.dtype | None) -> ILFModel:
    """The model that trains: F and s themselves on the shared backbone, or on a copy of it in another dtype.

    The adapter is new, so compiling it leaves the caller's adapter unchanged.
    """
    backbone = model.backbone
    if dtype is not None:
        backbone = deepcopy(backbone)
        nn.Module.to(backbone, dtype)  # diffusers' own warns of modules to keep in float32; these models have none
    return ILFModel(backbone_of(backbone), model.loop, model.feedback)


def mean_model(model: ILFModel) -> ILFModel:
    """The model of the running mean: the same backbone, and copies of F and s that do not train."""
    return ILFModel(model.adapter, model.loop, deepcopy(model.feedback).requires_grad_(False))


@torch.no_grad()
def update_mean(mean: ILFModel, model: ILFModel, *, half_life: float) -> None:
    """Move the running mean one iteration towards the weights of `model`, in place; `half_life` is in iterations."""
    weight = 1 - 0.5 ** (1 / half_life)
    pairs = zip(mean.feedback.parameters(), model.feedback.parameters(), strict=True)
    for mean_parameter, parameter in pairs:
        mean_parameter.lerp_(parameter, weight)


def new_optimizer(model: ILFModel, recipe: Recipe) -> Optimizer:
    """AdamW over F and s only. s has its own learning rate and no weight decay."""
    optimisation = recipe.optimisation
    groups = [
        {"params": list(model.feedback.block.parameters()), "full_lr": optimisation.lr},
        {"params": [model.feedback.scales], "full_lr": optimisation.scale_lr, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=optimisation.lr, weight_decay=optimisation.weight_decay)


def clip_gradient(optimizer: Optimizer, limit: float) -> Tensor:
    """Clip the gradient's norm to `limit` in place, 0 for no limit; return the norm before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
