"""Training: the loss against its definition, what learns, what a seed fixes, the log and the refusals."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from ilf_trt import ILFModel, attach, load_ilf, save_ilf
from ilf_trt.checkpoint import read_checkpoint
from ilf_trt.errors import InvalidRequest
from ilf_trt.training import LOG_EVERY, Batch, Recipe, SecondPass, Teacher, noised, train_feedback
from tests.conftest import CLASSES, LOOP, small_dit, small_pixart

ALPHAS: Tensor = DPMSolverMultistepScheduler().alphas_cumprod
RECIPE = Recipe(iterations=30, batch_size=16, learning_rate=1e-3, scale_learning_rate=2e-2, weight_decay=0.0, seed=0)
# Measured 0.66 to 0.73 over six seeds, and 0.99 with learning rates of zero.
FALL = 0.8
# The noise is recovered from x_t by a division by sqrt(1 - alpha), 0.01 at the smallest time.
RECOVERED = 1e-3
# A sum of two means in float32.
FLOAT32_ROUNDING = 1e-6


def batch(size: int = RECIPE.batch_size) -> Batch:
    generator = torch.Generator().manual_seed(7)
    x0 = torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1
    return Batch(x0, {"class_labels": torch.arange(size) % (CLASSES + 1)})


def train(recipe: Recipe = RECIPE, model: ILFModel | None = None, **options: Any) -> tuple[ILFModel, list[float]]:
    model = model or attach(small_dit(), LOOP)
    losses: list[float] = []
    options.setdefault("batches", repeat(batch(recipe.batch_size)))
    batches: Iterator[Batch] = options.pop("batches")
    train_feedback(model, batches, ALPHAS, recipe, progress=lambda _, loss: losses.append(loss), **options)
    return model, losses


def feedback_of(model: ILFModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.feedback.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


@dataclass
class Seen:
    """One call of the model: latent, timestep, t_post, with feedback or not, output."""

    x: Tensor
    time: Tensor
    t_post: Tensor | None
    feedback: bool
    output: Tensor


def one_iteration(**changes: Any) -> tuple[list[Seen], float]:
    """The calls of one iteration of training with scales that are not zero, and its loss."""
    model = attach(small_dit(), LOOP)
    torch.nn.init.constant_(model.feedback.scales, 0.3)
    seen: list[Seen] = []

    def keep(_: object, arguments: tuple[Tensor, ...], options: dict[str, Any], output: Any) -> None:
        feedback = options.get("feedback", True)
        seen.append(Seen(arguments[0], options["timestep"], options.get("t_post"), feedback, output.sample.detach()))

    model.register_forward_hook(keep, with_kwargs=True)
    _, losses = train(replace(RECIPE, iterations=1, **changes), model)
    return seen, losses[0]


def noise_in(seen: Seen) -> Tensor:
    kept = ALPHAS[seen.time].reshape(-1, 1, 1, 1)
    return (seen.x - kept.sqrt() * batch().x0) / (1 - kept).sqrt()


# --- the loss


def test_noised_is_the_diffusion_of_diffusers() -> None:
    x0, noise = torch.randn(2, 4, 1, 8, 8)
    time = torch.tensor([0, 1, 500, 999])
    assert torch.allclose(noised(x0, noise, time, ALPHAS), DDPMScheduler().add_noise(x0, noise, time))


def test_an_iteration_calls_the_student_and_once_the_teacher() -> None:
    (student, teacher), _ = one_iteration()
    assert (student.feedback, teacher.feedback) == (True, False)


def test_the_teacher_sees_the_same_image_and_noise_at_half_the_time() -> None:
    (student, teacher), _ = one_iteration()
    assert torch.equal(teacher.time, student.time // 2)
    assert torch.allclose(noise_in(teacher), noise_in(student), atol=RECOVERED)


def test_every_picture_has_its_own_time_over_the_whole_range() -> None:
    (student, _), _ = one_iteration()
    assert student.time.shape == (RECIPE.batch_size,)
    assert len(student.time.unique()) > RECIPE.batch_size // 2
    assert 0 <= student.time.min() < 250 < 750 < student.time.max() < len(ALPHAS)


def test_the_loss_is_reconstruction_plus_distillation_over_the_predicted_noise() -> None:
    (student, teacher), loss = one_iteration()
    epsilon = student.output[:, :1]  # the second channel is the variance
    wanted = F.mse_loss(epsilon, noise_in(student)) + F.mse_loss(epsilon, teacher.output[:, :1])
    assert loss == pytest.approx(wanted.item(), rel=RECOVERED)


def test_without_a_teacher_the_loss_is_reconstruction_only() -> None:
    (student,), loss = one_iteration(teacher=Teacher.NONE)
    assert loss == pytest.approx(F.mse_loss(student.output[:, :1], noise_in(student)).item(), rel=RECOVERED)


@pytest.mark.parametrize(("second_pass", "divisor"), [(SecondPass.SAME, 1), (SecondPass.HALF, 2)])
def test_the_second_pass_is_conditioned_on(second_pass: SecondPass, divisor: int) -> None:
    (student, _), _ = one_iteration(second_pass=second_pass)
    assert student.t_post is not None
    assert torch.equal(student.t_post, student.time // divisor)


# --- what learns


def test_the_loss_falls() -> None:
    _, losses = train()
    assert len(losses) == RECIPE.iterations
    assert sum(losses[-5:]) < FALL * sum(losses[:5])


def test_only_the_feedback_changes() -> None:
    model = attach(small_dit(), LOOP)
    backbone = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    before = feedback_of(model)
    train(replace(RECIPE, iterations=5), model)
    after = feedback_of(model)
    assert equal(backbone, dict(model.backbone.state_dict()))
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_a_pixart_trains_too() -> None:
    model = attach(small_pixart(sized=True), LOOP)
    generator = torch.Generator().manual_seed(8)
    pictures = Batch(
        torch.randn(4, 4, 16, 16, generator=generator),
        {
            "encoder_hidden_states": torch.randn(4, 7, 32, generator=generator),
            "encoder_attention_mask": torch.ones(4, 7),
            "added_cond_kwargs": {"resolution": torch.full((4, 2), 128.0), "aspect_ratio": torch.ones(4, 1)},
        },
    )
    before = feedback_of(model)
    train(replace(RECIPE, iterations=2, batch_size=4), model, batches=repeat(pictures))
    assert not torch.equal(feedback_of(model)["scales"], before["scales"])
    assert not torch.equal(feedback_of(model)["block.attn1.to_q.weight"], before["block.attn1.to_q.weight"])


def test_the_scales_have_their_own_learning_rate_and_no_decay() -> None:
    model = attach(small_dit(), LOOP)
    before = feedback_of(model)
    torch.nn.init.constant_(model.feedback.scales, 0.5)
    train(replace(RECIPE, iterations=1, learning_rate=0.0, scale_learning_rate=0.01, weight_decay=0.9), model)
    after = feedback_of(model)
    assert torch.allclose((after["scales"] - 0.5).abs(), torch.full((2,), 0.01), rtol=1e-3)  # Adam's first step
    assert equal({**before, "scales": after["scales"]}, after)


# --- what a seed fixes


def test_a_seed_gives_the_same_weights_and_losses_again() -> None:
    recipe = replace(RECIPE, iterations=4)
    models = [attach(small_dit(), LOOP), attach(small_dit(), LOOP)]
    losses = []
    for state, model in enumerate(models):
        torch.manual_seed(100 + state)  # what was drawn before does not matter
        losses.append(train(recipe, model)[1])
    assert losses[0] == losses[1]
    assert equal(feedback_of(models[0]), feedback_of(models[1]))


def test_another_seed_gives_other_weights() -> None:
    recipe = replace(RECIPE, iterations=4)
    (first, first_losses), (second, second_losses) = train(recipe), train(replace(recipe, seed=1))
    assert first_losses != second_losses
    assert not torch.equal(feedback_of(first)["scales"], feedback_of(second)["scales"])


@pytest.mark.parametrize("change", [{"teacher": Teacher.NONE}, {"second_pass": SecondPass.HALF}], ids=str)
def test_teacher_and_second_pass_change_the_weights(change: dict[str, Any]) -> None:
    recipe = replace(RECIPE, iterations=4)
    (plain, _), (changed, _) = train(recipe), train(replace(recipe, **change))
    assert not torch.equal(feedback_of(plain)["scales"], feedback_of(changed)["scales"])


# --- the log and the facts


def test_the_log_is_json_lines_of_iteration_loss_and_scales(tmp_path: Path) -> None:
    log = tmp_path / "feedback.jsonl"
    log.write_text("of an older training\n")
    recipe = replace(RECIPE, iterations=LOG_EVERY + 3, batch_size=2)
    model, losses = train(recipe, log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [LOG_EVERY, LOG_EVERY + 3]
    assert [line["loss"] for line in lines] == [losses[LOG_EVERY - 1], losses[-1]]
    assert lines[-1]["scales"] == model.feedback.scales.tolist()


def test_the_facts_are_the_recipe_and_the_mean_loss() -> None:
    losses: list[float] = []
    recipe = replace(RECIPE, iterations=3, second_pass=SecondPass.HALF)
    facts = train_feedback(
        attach(small_dit(), LOOP), repeat(batch()), ALPHAS, recipe, progress=lambda _, loss: losses.append(loss)
    )
    assert facts["mean_loss"] == pytest.approx(sum(losses) / 3, rel=FLOAT32_ROUNDING)
    assert (facts["seed"], facts["iterations"], facts["second_pass"]) == (0, 3, "t/2")
    assert json.loads(json.dumps(facts)) == facts


def test_a_trained_model_is_saved_with_its_facts_and_loaded(tmp_path: Path) -> None:
    model = attach(small_dit(), LOOP)
    facts = train_feedback(model, repeat(batch()), ALPHAS, replace(RECIPE, iterations=2))
    save_ilf(model, tmp_path, training=facts)
    assert read_checkpoint(tmp_path).training == facts
    assert equal(feedback_of(load_ilf(tmp_path)), feedback_of(model))


# --- refusals


def test_a_loss_of_nan_is_refused_with_its_iteration() -> None:
    good, bad = batch(), batch()
    bad.x0[0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidRequest, match="loss is NaN at iteration 3; lower the learning rate"):
        train(batches=iter([good, good, bad]))


def test_an_infinite_loss_is_refused() -> None:
    backbone = small_dit()
    with torch.no_grad():
        backbone.proj_out_2.weight.mul_(1e30)
    with pytest.raises(InvalidRequest, match=r"loss is .* at iteration 1"):
        train(replace(RECIPE, iterations=1), attach(backbone, LOOP))


def test_a_refused_iteration_does_not_touch_the_weights() -> None:
    model = attach(small_dit(), LOOP)
    before = feedback_of(model)
    bad = batch()
    bad.x0[0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidRequest):
        train(model=model, batches=iter([bad]))
    assert equal(feedback_of(model), before)


def test_the_log_survives_a_refusal(tmp_path: Path) -> None:
    bad = batch(2)
    bad.x0[0, 0, 0, 0] = float("nan")
    log = tmp_path / "feedback.jsonl"
    with pytest.raises(InvalidRequest):
        train(replace(RECIPE, iterations=99), log=log, batches=iter([batch(2)] * LOG_EVERY + [bad]))
    assert [json.loads(line)["iteration"] for line in log.read_text().splitlines()] == [LOG_EVERY]
