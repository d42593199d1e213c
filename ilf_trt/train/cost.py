"""What a training will cost, counted on shapes alone: parameters, memory, arithmetic, hours; no weight is needed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ilf_trt.model.backbone import Backbone
from ilf_trt.model.backbones import adapter_of_kind
from ilf_trt.model.surgery import attach
from ilf_trt.train.batch_stream import Batch
from ilf_trt.train.losses import Objective
from ilf_trt.train.recipe import Loss, LossKind, Recipe, TrainPrecision

TRAIN_TIMES = 1000
BYTES = {TrainPrecision.FP32: 4, TrainPrecision.BF16: 2, TrainPrecision.FP16: 2}
MOMENTS, WHOLE = 2, 4
TERA, HOUR_S = 1e12, 3600.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes are of one process; FLOP (two a multiply-add) of the whole batch, what is recomputed included.

    `activations_bytes` is an estimate: what autograd keeps for the rows that run at once, attention fused.
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
        """At a rate over all devices."""
        return self.total_flop / (rate_tflops * TERA) / HOUR_S


def cost_of(recipe: Recipe, kind: str, config: Mapping[str, Any], *, world: int = 1) -> Cost:
    """The cost of a recipe on a backbone of `kind` and `config`, split over `world` processes.

    Raises InvalidRequest for a loop or a batch that does not fit, UnsupportedBackbone for a kind without an adapter.
    """
    optimisation, compute = recipe.optimisation, recipe.compute
    rows = optimisation.rows_at_once(world)
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        backbone = getattr(diffusers, adapter_of_kind(kind).model_class)(**options)
    nn.Module.to(backbone, "meta")  # position embeddings come from numpy
    model = attach(backbone, recipe.model.loop, initialisation=recipe.model.initialisation)
    frozen = sum(parameter.numel() for parameter in backbone.parameters())
    trained = sum(parameter.numel() for parameter in model.feedback.parameters())
    width = BYTES[compute.precision]
    means = int(optimisation.ema > 0)

    nn.Module.to(model, torch.bfloat16 if width == 2 else torch.float32)  # no autocast on shapes
    alphas = torch.empty(TRAIN_TIMES, device="meta")
    objective = Objective(model, alphas, recipe.loss, recompute=compute.gradient_checkpointing)
    with FlopCounterMode(display=False) as counter:
        _row(objective, model.adapter, recipe.model.text_tokens).backward()
    whole = Objective(model, alphas, Loss(LossKind.NONE, recipe.loss.second_pass, 0.0))  # a teacher keeps nothing
    kept = _kept_bytes(whole, model.adapter, recipe.model.text_tokens)
    if compute.gradient_checkpointing:
        blocks = 1 + len(model.adapter.blocks) - model.loop.begin
        tokens = model.adapter.grid[0] * model.adapter.grid[1] * model.adapter.width
        kept = kept // blocks + blocks * tokens * WHOLE
    return Cost(
        frozen_parameters=frozen,
        trained_parameters=trained,
        frozen_bytes=frozen * width,
        trained_bytes=trained * WHOLE * (2 + means),  # with gradients
        optimizer_bytes=trained * WHOLE * MOMENTS,
        activations_bytes=kept * rows,
        checkpoint_bytes=trained * WHOLE * (1 + means + MOMENTS),
        rows_at_once=rows,
        step_flop=float(counter.get_total_flops() * optimisation.batch_size),
        iterations=optimisation.iterations,
    )


def _row(objective: Objective, adapter: Backbone, text_tokens: int) -> Tensor:
    """The loss of one row of shapes."""
    x0 = torch.empty(1, *adapter.latent, device="meta")
    call: dict[str, Any] = {"class_labels": torch.zeros(1, dtype=torch.long, device="meta")}
    if adapter.kind != "dit":
        sizes = {"resolution": (1, 2), "aspect_ratio": (1, 1)}
        length = text_tokens or 1
        call = {
            "encoder_hidden_states": torch.empty(1, length, adapter.text_channels, device="meta"),  # type: ignore[attr-defined]
            "encoder_attention_mask": torch.ones(1, length, device="meta"),
            "added_cond_kwargs": {name: torch.ones(shape, device="meta") for name, shape in sizes.items()},
        }
    time = torch.zeros(1, dtype=torch.long, device="meta")
    return objective.total(objective(Batch(x0, call), time, torch.empty_like(x0), torch.zeros(1, device="meta")))


def _kept_bytes(objective: Objective, adapter: Backbone, text_tokens: int) -> int:
    """What autograd keeps of one row: no weights, and no attention matrices, which a fused attention never makes."""
    weights = {p.untyped_storage()._cdata for p in (*objective.parameters(), *objective.buffers())}
    tokens = adapter.grid[0] * adapter.grid[1]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        matrix = tensor.ndim >= 3 and tensor.shape[-2] == tokens and tensor.shape[-1] in (tokens, text_tokens)
        if storage._cdata not in weights and not matrix:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _row(objective, adapter, text_tokens)
    assert loss.requires_grad
    return sum(kept.values())
