"""The losses that train F and s: reconstruction, and distillation from the frozen backbone itself.

Letters as in arXiv 2501.13107: x_t is x0 noised to t, eps the noise, F the feedback block; student: the model with
feedback, teacher: without. Legend: B pictures, C H W latent.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ilf_trt.model.backbone import Context
from ilf_trt.model.ilf_model import FirstPass, ILFModel
from ilf_trt.train.batch_stream import Batch
from ilf_trt.train.recipe import Loss, LossKind, SecondPass

CLEAN_VARIANCE = 1e-7


class Objective(nn.Module):
    """L = w_r |student - eps|^2 + w_d |student - teacher|^2, by row; no graph is recorded before F."""

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

        `share` (B,) in [0, 1) draws how long a step is, where the loss asks for steps.
        """
        time, later = self._step(time, share)
        with autocasting(noise.device.type, self.autocast):
            with torch.no_grad():
                context = self.model.adapter.context(batch.call)
                x_t = noised(batch.x0, noise, time, self.alphas_cumprod)
                first = self.model.first_pass(x_t, time, context, residual=torch.float32)
                teacher = self._teacher(batch.x0, noise, x_t, first, later)
            student = self._epsilon(self.model.second_pass(first, self._t_post(time, later), recompute=self.recompute))
        reconstruction = squared(student, noise)
        distillation = torch.zeros_like(reconstruction) if teacher is None else squared(student, teacher)
        return torch.stack([reconstruction, distillation])

    def total(self, terms: Tensor) -> Tensor:
        """terms (2, B) -> the loss, a mean over rows of the weighted sum."""
        return self.loss.reconstruction * terms[0].mean() + self.loss.distillation * terms[1].mean()

    def _step(self, time: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """time (B,) and where the teacher looks, or where one solver step leads to; 0 stands for the clean image."""
        if self.loss.kind is not LossKind.INTERVAL:
            half = time // 2
            return time, torch.maximum(half, time - self.loss.look_ahead) if self.loss.look_ahead else half
        few, most = self.loss.fewest_steps, self.loss.most_steps
        steps = few + (share * (most - few + 1)).long()
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
        """Fast Approximate Distillation (section 3.2): the teacher sees the same image and noise at t/2, once.

        `later` (B,) is t/2, or nearer to t where `look_ahead` says so.
        """
        return self._plain(noised(x0, noise, later, self.alphas_cumprod), later, context)

    def standard(self, x_t: Tensor, first: FirstPass, later: Tensor, steps: int) -> Tensor:
        """Standard distillation: the teacher's prediction at t/2 after `steps` forwards (8 in figure 11) from x_t.

        The paper leaves open what is matched. Its fast loss asks for the teacher's prediction at t/2 and calls that an
        approximation; what it approximates is then the way there: here the teacher walks from x_t to t/2 in `steps` - 1
        equal solver steps, where the fast loss noises the real image to t/2. Both targets are predictions at t/2. The
        first forward is the student's own first pass, so it costs only the blocks after the loop. `later` (B,) is t/2,
        or nearer to t where `look_ahead` says so.
        """
        x, time = x_t.float(), first.time
        epsilon = self._epsilon(self.model.finish(first.features, time, first.context, first.grid))
        for step in range(1, steps):
            following = first.time - (first.time - later) * step // (steps - 1)
            x = ddim(x, epsilon, time, following, self.alphas_cumprod)
            epsilon, time = self._plain(x, following, first.context), following
        return epsilon

    def interval(self, x_t: Tensor, first: FirstPass, later: Tensor, steps: int) -> Tensor:
        """Interval distillation: what takes one first-order step from t to `later` to where `steps` of the teacher end.

        The teacher walks in equal steps of DPM-Solver++ of second order, the first and one to the clean image of first.
        Not in the paper, whose teacher looks at single times; several steps become one as in progressive distillation
        (arXiv 2202.00512).
        """
        x, time, before = x_t.float(), first.time, None
        epsilon = self._epsilon(self.model.finish(first.features, time, first.context, first.grid))
        for step in range(1, steps + 1):
            following = first.time - (first.time - later) * step // steps
            x, before = dpm(x, epsilon, time, following, self.alphas_cumprod, before)
            time = following
            if step < steps:
                epsilon = self._plain(x, time, first.context)
        return straight(x_t.float(), x, first.time, later, self.alphas_cumprod)

    def _plain(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        first = self.model.first_pass(x, time, context, residual=torch.float32)
        return self._epsilon(self.model.finish(first.features, time, context, first.grid))

    def _epsilon(self, sample: Tensor) -> Tensor:
        """The predicted noise in float32, without a learned variance."""
        return sample[:, : self.model.adapter.latent[0]].float()


def noised(x0: Tensor, noise: Tensor, time: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps: x0 and noise (B, C, H, W), time (B,) -> (B, C, H, W)."""
    a = _by_row(alphas_cumprod, time)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def ddim(x: Tensor, epsilon: Tensor, time: Tensor, later: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """One deterministic DDIM step from `time` to `later` (B,): x and epsilon (B, C, H, W) -> x at `later`."""
    a, a_later = _by_row(alphas_cumprod, time), _by_row(alphas_cumprod, later)
    x0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
    return a_later.sqrt() * x0 + (1 - a_later).sqrt() * epsilon


Before = tuple[Tensor, Tensor]
"""x0 as it was predicted a step before, and the logarithm of alpha over sigma there."""


def dpm(
    x: Tensor, epsilon: Tensor, time: Tensor, later: Tensor, alphas_cumprod: Tensor, before: Before | None
) -> tuple[Tensor, Before]:
    """One step of DPM-Solver++ (arXiv 2211.01095, algorithm 2M) from `time` to `later` (B,), 0 being the clean image.

    Of first order without a step `before` and to the clean image. x and epsilon (B, C, H, W) -> x at `later`, and
    what the next step asks for.
    """
    (alpha, sigma), (alpha_later, sigma_later) = (_cleaned(alphas_cumprod, one) for one in (time, later))
    x0 = (x - sigma * epsilon) / alpha
    log_ratio = (alpha / sigma).log()
    h = (alpha_later / sigma_later).log() - log_ratio
    seen = x0
    if before is not None:
        x0_before, log_ratio_before = before
        second = x0 + 0.5 * h / (log_ratio - log_ratio_before) * (x0 - x0_before)
        seen = torch.where((later == 0).reshape(-1, 1, 1, 1), x0, second)
    return sigma_later / sigma * x - alpha_later * torch.expm1(-h) * seen, (x0, log_ratio)


def straight(x: Tensor, ended: Tensor, time: Tensor, later: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The noise that takes a step of first order from x at `time` to `ended` at `later`; all (B, C, H, W)."""
    (alpha, sigma), (alpha_later, sigma_later) = (_cleaned(alphas_cumprod, one) for one in (time, later))
    return (ended / alpha_later - x / alpha) / (sigma_later / alpha_later - sigma / alpha)


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference by row: (B, C, H, W) twice -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


def autocasting(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Matrix products in `dtype` for the time of a block; None leaves them as they are."""
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)


def _cleaned(alphas_cumprod: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma by row, where time 0 is the clean image but for a sigma that a logarithm can take."""
    a = torch.where((time == 0).reshape(-1, 1, 1, 1), 1 - CLEAN_VARIANCE, _by_row(alphas_cumprod, time))
    return a.sqrt(), (1 - a).sqrt()


def _by_row(alphas_cumprod: Tensor, time: Tensor) -> Tensor:
    return alphas_cumprod[time].reshape(-1, 1, 1, 1)
