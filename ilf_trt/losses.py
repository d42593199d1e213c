"""The losses that train F and s: reconstruction, and distillation from the frozen backbone itself.

Letters as in arXiv 2501.13107: x_t is x0 noised to t, eps the noise, F the feedback block; student: the model with
feedback, teacher: without. Legend: B pictures, C H W latent.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ilf_trt.backbone import Context
from ilf_trt.feed import Batch
from ilf_trt.model import FirstPass, ILFModel
from ilf_trt.recipe import Loss, LossKind, SecondPass


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

    def forward(self, batch: Batch, time: Tensor, noise: Tensor) -> Tensor:
        """batch of B rows, time (B,), noise (B, C, H, W) -> reconstruction and distillation by row, (2, B)."""
        with autocasting(noise.device.type, self.autocast):
            with torch.no_grad():
                context = self.model.adapter.context(batch.call)
                x_t = noised(batch.x0, noise, time, self.alphas_cumprod)
                first = self.model.first_pass(x_t, time, context, residual=torch.float32)
                teacher = self._teacher(batch.x0, noise, x_t, first)
            t_post = time if self.loss.second_pass is SecondPass.SAME else time // 2
            student = self._epsilon(self.model.second_pass(first, t_post, recompute=self.recompute))
        reconstruction = squared(student, noise)
        distillation = torch.zeros_like(reconstruction) if teacher is None else squared(student, teacher)
        return torch.stack([reconstruction, distillation])

    def total(self, terms: Tensor) -> Tensor:
        """terms (2, B) -> the loss, a mean over rows of the weighted sum."""
        return self.loss.reconstruction * terms[0].mean() + self.loss.distillation * terms[1].mean()

    def _teacher(self, x0: Tensor, noise: Tensor, x_t: Tensor, first: FirstPass) -> Tensor | None:
        if self.loss.kind is LossKind.NONE or not self.loss.distillation:
            return None
        if self.loss.kind is LossKind.FAST:
            return self.fast(x0, noise, first.time, first.context)
        return self.standard(x_t, first, self.loss.teacher_steps)

    def fast(self, x0: Tensor, noise: Tensor, time: Tensor, context: Context) -> Tensor:
        """Fast Approximate Distillation (section 3.2): the teacher sees the same image and noise at t/2, once."""
        half = time // 2
        return self._plain(noised(x0, noise, half, self.alphas_cumprod), half, context)

    def standard(self, x_t: Tensor, first: FirstPass, steps: int) -> Tensor:
        """Standard distillation: the teacher's prediction at t/2 after `steps` forwards (8 in figure 11) from x_t.

        The paper leaves open what is matched. Its fast loss asks for the teacher's prediction at t/2 and calls that an
        approximation; what it approximates is then the way there: here the teacher walks from x_t to t/2 in `steps` - 1
        equal solver steps, where the fast loss noises the real image to t/2. Both targets are predictions at t/2. The
        first forward is the student's own first pass, so it costs only the blocks after the loop.
        """
        x, time = x_t.float(), first.time
        epsilon = self._epsilon(self.model.finish(first.features, time, first.context))
        for step in range(1, steps):
            later = first.time - (first.time - first.time // 2) * step // (steps - 1)
            x = ddim(x, epsilon, time, later, self.alphas_cumprod)
            epsilon, time = self._plain(x, later, first.context), later
        return epsilon

    def _plain(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        first = self.model.first_pass(x, time, context, residual=torch.float32)
        return self._epsilon(self.model.finish(first.features, time, context))

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


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference by row: (B, C, H, W) twice -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


def autocasting(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Matrix products in `dtype` for the time of a block; None leaves them as they are."""
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)


def _by_row(alphas_cumprod: Tensor, time: Tensor) -> Tensor:
    return alphas_cumprod[time].reshape(-1, 1, 1, 1)
