"""The losses that train F and s: reconstruction of the noise, and distillation from the frozen backbone.

Letters as in arXiv 2501.13107: x_t is x0 with the noise of time t, eps the noise, F the feedback block. The student is
the model with feedback, the teacher the model without. Legend: B pictures, (C, H, W) the latent.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ilf_trt.model.context import Context
from ilf_trt.model.ilf_model import FirstPass, ILFModel

from .batch_stream import Batch
from .recipe import Loss, LossKind, SecondPass

CLEAN_VARIANCE = 1e-7


class Objective(nn.Module):
    """L = w_r |student - eps|^2 + w_d |student - teacher|^2 by row. Autograd records nothing before F."""

    alphas_cumprod: Tensor

    def __init__(
        self,
        model: ILFModel,
        alphas_cumprod: Tensor,
        loss: Loss,
        *,
        autocast: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.autocast, self.recompute = autocast, recompute
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)

    def forward(self, batch: Batch, time: Tensor, noise: Tensor, share: Tensor) -> Tensor:
        """batch of B rows, time (B,), noise (B, C, H, W) -> reconstruction and distillation by row, (2, B).

        `share` (B,) in [0, 1) picks the length of each row's interval; only interval distillation uses it.
        """
        time, later = self._step(time, share)
        with autocasting(noise.device.type, self.autocast):
            with torch.no_grad():
                adapter = self.model.adapter
                context = adapter.context(adapter.call(batch.conditions))
                x_t = add_noise(batch.x0, noise, time, self.alphas_cumprod)
                first = self.model.first_pass(x_t, time, context, residual=torch.float32)
                teacher = self._teacher(batch.x0, noise, x_t, first, later)
            student = self._epsilon(self.model.second_pass(first, self._t_post(time, later), recompute=self.recompute))
        reconstruction = squared_error(student, noise)
        distillation = torch.zeros_like(reconstruction) if teacher is None else squared_error(student, teacher)
        return torch.stack([reconstruction, distillation])

    def total(self, terms: Tensor) -> Tensor:
        """terms (2, B) -> the loss: the weighted sum of both terms, a mean over the rows."""
        return self.loss.reconstruction * terms[0].mean() + self.loss.distillation * terms[1].mean()

    def _step(self, time: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """The student's time (B,), and the later time (B,) of the teacher; 0 is the clean image.

        In interval distillation, the later time is the end of the interval.
        """
        if self.loss.kind is not LossKind.INTERVAL:
            half = time // 2
            return time, torch.maximum(half, time - self.loss.look_ahead) if self.loss.look_ahead else half
        fewest, most = self.loss.fewest_steps, self.loss.most_steps
        steps = fewest + (share * (most - fewest + 1)).long()
        time = time.clamp(min=self.loss.teacher_steps)
        return time, (time - len(self.alphas_cumprod) // steps).clamp(min=0)

    def _t_post(self, time: Tensor, later: Tensor) -> Tensor:
        if self.loss.second_pass is SecondPass.SAME:
            return time
        if self.loss.second_pass is SecondPass.HALF:
            return time // 2
        return time - (time - later) * (self.model.loop.size / len(self.model.adapter.blocks))

    def _teacher(self, x0: Tensor, noise: Tensor, x_t: Tensor, first: FirstPass, later: Tensor) -> Tensor | None:
        if self.loss.kind is LossKind.NONE or not self.loss.distillation:
            return None
        if self.loss.kind is LossKind.FAST:
            return self.fast(x0, noise, later, first.context)
        if self.loss.kind is LossKind.INTERVAL:
            return self.interval(x_t, first, later, self.loss.teacher_steps)
        return self.standard(x_t, first, later, self.loss.teacher_steps)

    def fast(self, x0: Tensor, noise: Tensor, later: Tensor, context: Context) -> Tensor:
        """Fast Approximate Distillation (section 3.2): one forward of the teacher on the same image and noise at t/2.

        `later` (B,) is t/2, or closer to t if `look_ahead` limits the distance.
        """
        return self._predict(add_noise(x0, noise, later, self.alphas_cumprod), later, context)

    def standard(self, x_t: Tensor, first: FirstPass, later: Tensor, steps: int) -> Tensor:
        """Standard distillation: the teacher's prediction at t/2 after `steps` forwards (8 in figure 11) from x_t.

        The paper does not define the target. It calls its fast loss, the teacher's prediction at t/2, an approximation.
        We read this as an approximation of the way to t/2: the fast loss adds noise to the real image, and here the
        teacher walks from x_t to t/2 in `steps` - 1 equal DDIM steps. Both targets are predictions at t/2. The first
        forward shares the student's first pass, so it costs only the blocks after the loop. `later` (B,) is t/2, or
        closer to t if `look_ahead` limits the distance.
        """
        x, time = x_t.float(), first.time
        epsilon = self._epsilon(self.model.finish(first.features, time, first.context, first.grid))
        for step in range(1, steps):
            following = first.time - (first.time - later) * step // (steps - 1)
            x = ddim(x, epsilon, time, following, self.alphas_cumprod)
            epsilon, time = self._predict(x, following, first.context), following
        return epsilon

    def interval(self, x_t: Tensor, first: FirstPass, later: Tensor, steps: int) -> Tensor:
        """Interval distillation: the noise whose one first-order step from t to `later` ends where the teacher ends.

        The teacher walks there in `steps` equal steps of DPM-Solver++ of second order; its first step, and a step to
        the clean image, are of first order. This loss is not in the paper, whose teacher predicts at single times. As
        in progressive distillation (arXiv 2202.00512), one step learns to replace several.
        """
        x, time, previous = x_t.float(), first.time, None
        epsilon = self._epsilon(self.model.finish(first.features, time, first.context, first.grid))
        for step in range(1, steps + 1):
            following = first.time - (first.time - later) * step // steps
            x, previous = dpm(x, epsilon, time, following, self.alphas_cumprod, previous)
            time = following
            if step < steps:
                epsilon = self._predict(x, time, first.context)
        return step_noise(x_t.float(), x, first.time, later, self.alphas_cumprod)

    def _predict(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        """The teacher's prediction of the noise: a forward without feedback."""
        first = self.model.first_pass(x, time, context, residual=torch.float32)
        return self._epsilon(self.model.finish(first.features, time, context, first.grid))

    def _epsilon(self, sample: Tensor) -> Tensor:
        """The predicted noise in float32, without a learned variance."""
        return sample[:, : self.model.adapter.latent[0]].float()


def add_noise(x0: Tensor, noise: Tensor, time: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps: x0 and noise (B, C, H, W), time (B,) -> (B, C, H, W)."""
    a = _by_row(alphas_cumprod, time)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def ddim(x: Tensor, epsilon: Tensor, time: Tensor, later: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """One deterministic DDIM step from `time` to `later` (B,): x and epsilon (B, C, H, W) -> x at `later`."""
    a, a_later = _by_row(alphas_cumprod, time), _by_row(alphas_cumprod, later)
    x0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
    return a_later.sqrt() * x0 + (1 - a_later).sqrt() * epsilon


PreviousStep = tuple[Tensor, Tensor]
"""The x0 that the previous step predicted, and log(alpha / sigma) at its time."""


def dpm(
    x: Tensor, epsilon: Tensor, time: Tensor, later: Tensor, alphas_cumprod: Tensor, previous: PreviousStep | None
) -> tuple[Tensor, PreviousStep]:
    """One step of DPM-Solver++ (arXiv 2211.01095, algorithm 2M) from `time` to `later` (B,); 0 is the clean image.

    x and epsilon (B, C, H, W) -> x at `later`, and the `previous` of the next step. The step is of first order without
    a `previous` step, and to the clean image.
    """
    (alpha, sigma), (alpha_later, sigma_later) = (_alpha_sigma(alphas_cumprod, t) for t in (time, later))
    x0 = (x - sigma * epsilon) / alpha
    log_ratio = (alpha / sigma).log()
    h = (alpha_later / sigma_later).log() - log_ratio
    direction = x0
    if previous is not None:
        x0_previous, log_ratio_previous = previous
        second = x0 + 0.5 * h / (log_ratio - log_ratio_previous) * (x0 - x0_previous)
        direction = torch.where((later == 0).reshape(-1, 1, 1, 1), x0, second)
    return sigma_later / sigma * x - alpha_later * torch.expm1(-h) * direction, (x0, log_ratio)


def step_noise(x: Tensor, x_later: Tensor, time: Tensor, later: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The noise of the first-order step from x at `time` to x_later at `later`; all (B, C, H, W), times (B,)."""
    (alpha, sigma), (alpha_later, sigma_later) = (_alpha_sigma(alphas_cumprod, t) for t in (time, later))
    return (x_later / alpha_later - x / alpha) / (sigma_later / alpha_later - sigma / alpha)


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """The mean squared difference of each row: a and b (B, C, H, W) -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


def autocasting(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """A context in which matrix products run in `dtype`; None changes nothing."""
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)


def _alpha_sigma(alphas_cumprod: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of each row. Time 0 is the clean image, with a sigma just large enough for a logarithm."""
    a = torch.where((time == 0).reshape(-1, 1, 1, 1), 1 - CLEAN_VARIANCE, _by_row(alphas_cumprod, time))
    return a.sqrt(), (1 - a).sqrt()


def _by_row(alphas_cumprod: Tensor, time: Tensor) -> Tensor:
    return alphas_cumprod[time].reshape(-1, 1, 1, 1)
