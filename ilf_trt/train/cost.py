"""The cost of a training: parameters, memory, arithmetic and hours, counted on shapes without weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ilf_trt.contract.ports import PICTURES, Role
from ilf_trt.errors import CheckpointError
from ilf_trt.model.backbone import Backbone
from ilf_trt.model.base import base_config
from ilf_trt.model.shapes import backbone_of_shapes
from ilf_trt.model.surgery import attach

from .batch_stream import Batch
from .losses import Objective
from .recipe import Loss, LossKind, Recipe, TrainPrecision

TRAIN_TIMES = 1000
BYTES = {TrainPrecision.FP32: 4, TrainPrecision.BF16: 2, TrainPrecision.FP16: 2}
MOMENTS, FLOAT32_BYTES = 2, 4
TERA, HOUR_S = 1e12, 3600.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of one process; FLOP of the whole batch, two for a multiply-add, with recomputation.

    `activations_bytes` is an estimate: the tensors that autograd keeps for the rows that run at once, attention fused.
    """

    frozen_parameters: int
    trained_parameters: int
    frozen_bytes: int
    trained_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    checkpoint_bytes: int
    rows_at_once: int
    step_flop: float
    iterations: int

    @property
    def total_flop(self) -> float:
        return self.step_flop * self.iterations

    def hours(self, rate_tflops: float) -> float:
        """The hours at `rate_tflops` TFLOP/s over all devices together."""
        return self.total_flop / (rate_tflops * TERA) / HOUR_S


def cost_of_recipe(recipe: Recipe, processes: int) -> Cost:
    """The cost on the backbone of the recipe: its `model.kind` and `model.config`, or those of its base on the disk.

    Raises CheckpointError if neither is there, and as `cost_of` does.
    """
    kind, config = recipe.model.kind, recipe.model.config
    if kind is None or not config:
        try:
            kind, config = base_config(recipe.model.base)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; or give model.kind and [model.config] in the recipe") from error
    return cost_of(recipe, kind, config, world=processes)


def cost_of(recipe: Recipe, kind: str, config: Mapping[str, Any], *, world: int = 1) -> Cost:
    """The cost of a recipe on a backbone of `kind` and `config`, split over `world` processes.

    Raises InvalidRequest for a loop or a batch that does not fit, UnsupportedBackbone as `backbone_of_shapes`.
    """
    optimisation, compute = recipe.optimisation, recipe.compute
    rows = optimisation.rows_at_once(world)
    backbone = backbone_of_shapes(kind, config)
    model = attach(backbone, recipe.model.loop, initialisation=recipe.model.initialisation)
    frozen_parameters = sum(parameter.numel() for parameter in backbone.parameters())
    trained_parameters = sum(parameter.numel() for parameter in model.feedback.parameters())
    width = BYTES[compute.precision]
    means = int(optimisation.ema > 0)

    nn.Module.to(model, torch.bfloat16 if width == 2 else torch.float32)  # no autocast on shapes
    alphas = torch.empty(TRAIN_TIMES, device="meta")
    objective = Objective(model, alphas, recipe.loss, recompute=compute.gradient_checkpointing)
    with FlopCounterMode(display=False) as counter:
        _row_loss(objective, model.adapter, recipe.model.text_tokens).backward()
    student = Objective(model, alphas, Loss(LossKind.NONE, recipe.loss.second_pass, 0.0))  # a teacher keeps nothing
    row_bytes = _row_bytes(student, model.adapter, recipe.model.text_tokens)
    if compute.gradient_checkpointing:
        blocks = 1 + len(model.adapter.blocks) - model.loop.begin
        tokens = model.adapter.grid[0] * model.adapter.grid[1] * model.adapter.width
        row_bytes = row_bytes // blocks + blocks * tokens * FLOAT32_BYTES
    return Cost(
        frozen_parameters=frozen_parameters,
        trained_parameters=trained_parameters,
        frozen_bytes=frozen_parameters * width,
        trained_bytes=trained_parameters * FLOAT32_BYTES * (2 + means),  # with gradients
        optimizer_bytes=trained_parameters * FLOAT32_BYTES * MOMENTS,
        activations_bytes=row_bytes * rows,
        checkpoint_bytes=trained_parameters * FLOAT32_BYTES * (1 + means + MOMENTS),
        rows_at_once=rows,
        step_flop=float(counter.get_total_flops() * optimisation.batch_size),
        iterations=optimisation.iterations,
    )


def _row_loss(objective: Objective, adapter: Backbone, text_tokens: int) -> Tensor:
    """The loss of one row, on shapes."""
    x0 = torch.empty(1, *adapter.latent, device="meta")
    conditions = {
        port.name: torch.zeros(
            port.resolve({PICTURES: 1}), dtype=torch.long if port.role is Role.LABEL else None, device="meta"
        )
        for port in adapter.conditioning(text_tokens or 1).positive
    }
    time = torch.zeros(1, dtype=torch.long, device="meta")
    return objective.total(objective(Batch(x0, conditions), time, torch.empty_like(x0), torch.zeros(1, device="meta")))


def _row_bytes(objective: Objective, adapter: Backbone, text_tokens: int) -> int:
    """The bytes that autograd keeps for one row, without weights and attention matrices: fused attention makes none."""
    weights = {p.untyped_storage()._cdata for p in (*objective.parameters(), *objective.buffers())}
    tokens = adapter.grid[0] * adapter.grid[1]
    bytes_by_storage: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        matrix = tensor.ndim >= 3 and tensor.shape[-2] == tokens and tensor.shape[-1] in (tokens, text_tokens)
        if storage._cdata not in weights and not matrix:
            bytes_by_storage[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _row_loss(objective, adapter, text_tokens)
    assert loss.requires_grad
    return sum(bytes_by_storage.values())
