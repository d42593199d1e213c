"""The losses: each against its equation written out, what is asked of the teacher, and what records a graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from ilf_trt import ILFModel, attach
from ilf_trt.train.batch_stream import Batch
from ilf_trt.train.losses import Objective, add_noise, ddim, dpm, squared_error, step_noise
from ilf_trt.train.recipe import Loss, LossKind, SecondPass
from tests.conftest import LOOP, small_dit, small_pixart
from tests.small_training import dit_rows, pixart_rows

ALPHAS: Tensor = DPMSolverMultistepScheduler().alphas_cumprod
LOSS = Loss(LossKind.FAST, SecondPass.SAME, 0.0)
SHARE = torch.tensor([0.0, 0.3, 0.6, 0.99])
INTERVAL = replace(LOSS, kind=LossKind.INTERVAL, second_pass=SecondPass.RESCALE, teacher_steps=4)
# A step of diffusers' own solver, which adds 1e-8 of noise where ours takes the clean image at 1e-7.
SOLVER = {"rtol": 2e-3, "atol": 2e-3}
TIME = torch.tensor([1, 240, 501, 999])
# Sums of a few thousand float32 products in another order.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-6}
# A division by sqrt(alpha), 0.006 at time 999, between the two.
DDIM = {"rtol": 1e-3, "atol": 1e-3}


def fed_back(backbone: Any) -> ILFModel:
    """A model whose feedback block is its own and whose scales are not zero."""
    model = attach(backbone, LOOP)
    torch.manual_seed(3)
    with torch.no_grad():
        model.feedback.scales.copy_(torch.tensor([0.3, -0.2]))
        for parameter in model.feedback.block.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model() -> ILFModel:
    return fed_back(small_dit())


@pytest.fixture(scope="module")
def rows() -> Batch:
    return dit_rows(4)


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def a(time: Tensor) -> Tensor:
    return ALPHAS[time].reshape(-1, 1, 1, 1)


def x_at(time: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps, written out."""
    return a(time) ** 0.5 * x0 + (1 - a(time)) ** 0.5 * noise


@torch.no_grad()
def student_of(model: ILFModel, rows: Batch, noise: Tensor, t_post: Tensor) -> Tensor:
    """The model as a caller uses it; the second channel is the variance."""
    sample: Tensor = model(x_at(TIME, rows.x0, noise), TIME, rows.conditions["class_labels"], t_post=t_post).sample
    return sample[:, :1]


@torch.no_grad()
def teacher_of(model: ILFModel, x: Tensor, time: Tensor, rows: Batch) -> Tensor:
    """The backbone itself, by diffusers' own code."""
    sample: Tensor = model.backbone(x, timestep=time, class_labels=rows.conditions["class_labels"]).sample
    return sample[:, :1]


def mse(x: Tensor, y: Tensor) -> Tensor:
    return ((x - y) ** 2).mean(dim=(1, 2, 3))


def terms_of(model: ILFModel, rows: Batch, noise: Tensor, loss: Loss = LOSS, **options: Any) -> Tensor:
    terms: Tensor = Objective(model, ALPHAS, loss, **options)(rows, TIME, noise, SHARE)
    return terms


@contextmanager
def count_calls(model: ILFModel, name: str) -> Iterator[list[bool]]:
    """Calls of a method of the model or its adapter: for each whether a graph was recorded."""
    owner: Any = model if hasattr(model, name) else model.adapter
    calls: list[bool] = []
    before = getattr(owner, name)

    def note_call(*arguments: Any, **options: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return before(*arguments, **options)

    setattr(owner, name, note_call)
    try:
        yield calls
    finally:
        delattr(owner, name)


# --- the equations


def test_noised_is_the_diffusion_of_diffusers(rows: Batch, noise: Tensor) -> None:
    expected = DDPMScheduler().add_noise(rows.x0, noise, TIME)
    assert torch.allclose(add_noise(rows.x0, noise, TIME, ALPHAS), expected, **FLOAT32)


def test_a_ddim_step_with_the_true_noise_lands_on_the_diffusion_of_the_later_time(rows: Batch, noise: Tensor) -> None:
    later = TIME // 3
    x = ddim(x_at(TIME, rows.x0, noise), noise, TIME, later, ALPHAS)
    assert torch.allclose(x, x_at(later, rows.x0, noise), **DDIM)


def test_the_squared_error_is_a_mean_over_each_row() -> None:
    x, y = torch.randn(2, 3, 2, 4, 4)
    assert torch.allclose(squared_error(x, y), mse(x, y))


def test_reconstruction_is_the_student_against_the_noise(model: ILFModel, rows: Batch, noise: Tensor) -> None:
    result = terms_of(model, rows, noise)[0]
    assert torch.allclose(result, mse(student_of(model, rows, noise, TIME), noise), **FLOAT32)


def test_fast_distillation_asks_the_teacher_once_for_the_same_image_and_noise_at_half_the_time(
    model: ILFModel, rows: Batch, noise: Tensor
) -> None:
    half = TIME // 2
    teacher = teacher_of(model, x_at(half, rows.x0, noise), half, rows)
    expected = mse(student_of(model, rows, noise, TIME), teacher)
    assert torch.allclose(terms_of(model, rows, noise)[1], expected, **FLOAT32)


def test_fast_distillation_looks_no_further_ahead_than_it_is_told(model: ILFModel, rows: Batch, noise: Tensor) -> None:
    later = torch.tensor([0, 140, 401, 899])
    teacher = teacher_of(model, x_at(later, rows.x0, noise), later, rows)
    expected = mse(student_of(model, rows, noise, TIME), teacher)
    result = terms_of(model, rows, noise, replace(LOSS, look_ahead=100))[1]
    assert torch.allclose(result, expected, **FLOAT32)


def test_standard_distillation_walks_no_further_ahead_than_it_is_told(
    model: ILFModel, rows: Batch, noise: Tensor
) -> None:
    later, x = torch.tensor([0, 140, 401, 899]), x_at(TIME, rows.x0, noise)
    at_later = ddim(x, teacher_of(model, x, TIME, rows), TIME, later, ALPHAS)
    expected = mse(student_of(model, rows, noise, TIME), teacher_of(model, at_later, later, rows))
    walk = replace(LOSS, kind=LossKind.STANDARD, teacher_steps=2, look_ahead=100)
    assert torch.allclose(terms_of(model, rows, noise, walk)[1], expected, **FLOAT32)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_standard_distillation_walks_to_half_the_time_in_k_forwards(
    model: ILFModel, rows: Batch, noise: Tensor, steps: int
) -> None:
    x, time = x_at(TIME, rows.x0, noise), TIME
    epsilon = teacher_of(model, x, time, rows)
    for step in range(1, steps):
        later = TIME - (TIME - TIME // 2) * step // (steps - 1)
        x0 = (x - (1 - a(time)) ** 0.5 * epsilon) / a(time) ** 0.5
        x, time = x_at(later, x0, epsilon), later
        epsilon = teacher_of(model, x, time, rows)
    assert torch.equal(time, TIME // 2)
    result = terms_of(model, rows, noise, replace(LOSS, kind=LossKind.STANDARD, teacher_steps=steps))[1]
    assert torch.allclose(result, mse(student_of(model, rows, noise, TIME), epsilon), **DDIM)


def test_reconstruction_only_has_no_second_term(model: ILFModel, rows: Batch, noise: Tensor) -> None:
    terms = terms_of(model, rows, noise, replace(LOSS, kind=LossKind.NONE))
    assert torch.equal(terms[1], torch.zeros(4))
    assert torch.equal(terms[0], terms_of(model, rows, noise)[0])


@pytest.mark.parametrize(("second_pass", "divisor"), [(SecondPass.SAME, 1), (SecondPass.HALF, 2)])
def test_the_second_pass_is_conditioned_on(
    model: ILFModel, rows: Batch, noise: Tensor, second_pass: SecondPass, divisor: int
) -> None:
    result = terms_of(model, rows, noise, replace(LOSS, second_pass=second_pass))[0]
    assert torch.allclose(result, mse(student_of(model, rows, noise, TIME // divisor), noise), **FLOAT32)


def test_an_interval_is_that_of_a_sampler_s_step_and_never_shorter_than_the_teacher_s_steps(model: ILFModel) -> None:
    objective = Objective(model, ALPHAS, replace(INTERVAL, fewest_steps=5, most_steps=10))
    time, later = objective._step(torch.tensor([999, 999, 150, 1]), torch.tensor([0.0, 0.999, 0.0, 0.5]))
    assert time.tolist() == [999, 999, 150, 4]
    assert later.tolist() == [799, 899, 0, 0]


def test_an_interval_s_second_pass_is_conditioned_on_the_rescaled_time(
    model: ILFModel, rows: Batch, noise: Tensor
) -> None:
    objective = Objective(model, ALPHAS, INTERVAL)
    time, later = objective._step(TIME, SHARE)
    t_post = time - (time - later) * (model.loop.size / len(model.adapter.blocks))
    with torch.no_grad():
        sample = model(x_at(time, rows.x0, noise), time, rows.conditions["class_labels"], t_post=t_post).sample[:, :1]
    assert torch.allclose(terms_of(model, rows, noise, INTERVAL)[0], mse(sample, noise), **FLOAT32)


def test_an_interval_s_target_ends_a_single_step_where_diffusers_own_steps_end(
    model: ILFModel, rows: Batch, noise: Tensor
) -> None:
    objective = Objective(model, ALPHAS, INTERVAL)
    time, later = torch.tensor([800]), torch.tensor([600])
    one = rows.part(slice(0, 1), torch.device("cpu"))
    scheduler = DPMSolverMultistepScheduler(solver_order=2, final_sigmas_type="sigma_min", lower_order_final=False)
    scheduler.set_timesteps(timesteps=[800, 750, 700, 650, 600])
    x = x_at(time, one.x0, noise[:1])
    x_t = x
    with torch.no_grad():
        for t in scheduler.timesteps[:4]:
            x = scheduler.step(teacher_of(model, x, t.reshape(1), one), t, x).prev_sample
        first = model.first_pass(x_t, time, model.adapter.context(model.adapter.call(one.conditions)))
        epsilon = objective.interval(x_t, first, later, 4)
    assert torch.allclose(ddim(x_t, epsilon, time, later, ALPHAS), x, **SOLVER)


def test_a_step_to_time_zero_ends_at_the_clean_image() -> None:
    x, epsilon = torch.randn(2, 1, 1, 4, 4)
    time, zero = torch.tensor([40]), torch.tensor([0])
    ended, _ = dpm(x, epsilon, time, zero, ALPHAS, None)
    a = ALPHAS[40]
    assert torch.allclose(ended, (x - (1 - a).sqrt() * epsilon) / a.sqrt(), atol=1e-3)
    assert torch.allclose(step_noise(x, ended, time, zero, ALPHAS), epsilon, atol=1e-2)


def test_an_interval_has_targets_at_every_time(model: ILFModel, rows: Batch, noise: Tensor) -> None:
    objective = Objective(model, ALPHAS, INTERVAL)
    for time in (0, 1, 5, 90, 500, 999):
        result = objective(rows, torch.full((4,), time), noise, SHARE)
        assert torch.isfinite(result).all()


def test_the_total_is_the_weighted_sum_of_both_means(model: ILFModel) -> None:
    objective = Objective(model, ALPHAS, replace(LOSS, reconstruction=0.5, distillation=3.0))
    terms = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert objective.total(terms).item() == 0.5 * 2 + 3 * 6


def test_a_pixart_s_loss_is_the_same_equation() -> None:
    model, rows = fed_back(small_pixart(sized=True)), pixart_rows(4)
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        student = model(
            x_at(TIME, rows.x0, noise), timestep=TIME, t_post=TIME, **model.adapter.call(rows.conditions)
        ).sample[:, :4]
        half = TIME // 2
        teacher = model.backbone(
            x_at(half, rows.x0, noise), timestep=half, **model.adapter.call(rows.conditions)
        ).sample[:, :4]
    result = terms_of(model, rows, noise)
    assert torch.allclose(result, torch.stack([mse(student, noise), mse(student, teacher)]), **FLOAT32)


# --- what is computed, and how often


def test_nothing_before_the_feedback_block_records_a_graph(model: ILFModel, rows: Batch, noise: Tensor) -> None:
    with count_calls(model, "first_pass") as first, count_calls(model, "second_pass") as second:
        terms_of(model, rows, noise)
    assert (first, second) == ([False, False], [True])


def test_what_a_batch_asks_for_is_embedded_once(model: ILFModel, rows: Batch, noise: Tensor) -> None:
    with count_calls(model, "context") as calls:
        terms_of(model, rows, noise)
    assert calls == [False]


@pytest.mark.parametrize(
    ("change", "forwards"),
    [
        ({}, 2),
        ({"kind": LossKind.NONE}, 1),
        ({"distillation": 0.0}, 1),
        ({"kind": LossKind.STANDARD, "teacher_steps": 5}, 5),
    ],
    ids=["fast", "none", "no weight", "standard, whose first is the student's"],
)
def test_first_passes_of_an_iteration(
    model: ILFModel, rows: Batch, noise: Tensor, change: dict[str, Any], forwards: int
) -> None:
    with count_calls(model, "first_pass") as calls:
        terms_of(model, rows, noise, replace(LOSS, **change))
    assert len(calls) == forwards


def test_modulation_of_the_loop_at_t_is_made_once_for_both_passes(model: ILFModel, rows: Batch, noise: Tensor) -> None:
    counts = []
    for second_pass in SecondPass:
        with count_calls(model, "modulation") as calls:
            terms_of(model, rows, noise, replace(LOSS, second_pass=second_pass))
        counts.append(len(calls))
    assert counts[0] == counts[1] - 1


def test_gradients_reach_the_feedback_alone(model: ILFModel, rows: Batch, noise: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    terms_of(model, rows, noise).sum().backward()
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"feedback"}
    assert [name for name, p in model.feedback.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_at_zero_scales_the_scales_alone_have_a_gradient(rows: Batch, noise: Tensor) -> None:
    model = attach(small_dit(), LOOP)
    terms_of(model, rows, noise).sum().backward()
    assert model.feedback.scales.grad.all()  # type: ignore[union-attr]
    assert not any(parameter.grad.any() for parameter in model.feedback.block.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [small_dit, lambda: small_pixart(sized=True)], ids=["dit", "pixart"])
def test_recomputing_activations_changes_no_gradient(make: Any) -> None:
    model = fed_back(make())
    rows = dit_rows(4) if model.adapter.kind == "dit" else pixart_rows(4)
    noise = torch.randn(4, *model.adapter.latent, generator=torch.Generator().manual_seed(2))
    gradients, runs = [], []
    for recompute in (False, True):
        model.zero_grad(set_to_none=True)
        with count_calls(model, "block") as calls:
            terms_of(model, rows, noise, recompute=recompute).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.feedback.parameters()]))  # type: ignore[union-attr]
        runs.append(len(calls))
    assert torch.equal(*gradients)
    assert runs[1] == runs[0] + 1 + 2 + 1  # F, the loop, and the block after it, once more


def test_bfloat16_leaves_predictions_and_loss_in_float32(model: ILFModel, rows: Batch, noise: Tensor) -> None:
    terms = terms_of(model, rows, noise, autocast=torch.bfloat16)
    assert terms.dtype is torch.float32
    assert not torch.equal(terms, terms_of(model, rows, noise))
