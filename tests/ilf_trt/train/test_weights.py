"""The weights of a training: what the optimizer holds, dtypes, sizes, and the running mean."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ilf_trt import attach
from ilf_trt.train.loop import Training
from ilf_trt.train.weights import new_optimizer
from tests.conftest import LOOP, small_dit
from tests.small_training import (
    FLOAT32,
    ITERATIONS,
    column,
    equal,
    feedback_of,
    run_training,
    small_model,
    small_recipe,
    small_setup,
    small_stream,
)

# bfloat16 keeps 8 bits, so matrix products are off by about 1 % of their size.
BF16_ROUNDING = 0.02


def test_the_optimizer_holds_feedback_and_scales_alone() -> None:
    model = small_model()
    optimizer = new_optimizer(model, small_recipe())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in parameters} == {id(parameter) for parameter in model.feedback.parameters()}


def test_the_scales_have_their_own_rate_and_no_decay(tmp_path: Path) -> None:
    model = small_model()
    torch.nn.init.constant_(model.feedback.scales, 0.5)
    before = feedback_of(model)
    recipe = small_recipe(optimisation={"iterations": 1, "lr": 0.0, "scale_lr": 0.01, "weight_decay": 0.9})
    after = feedback_of(run_training(tmp_path, recipe, model=model).model)
    assert torch.allclose((after["scales"] - 0.5).abs(), torch.full((2,), 0.01), rtol=1e-3)  # Adam's first step
    assert equal({**before, "scales": after["scales"]}, after)


def test_weight_decay_shrinks_the_feedback_block(tmp_path: Path) -> None:
    ends = []
    for decay in (0.0, 0.9):
        recipe = small_recipe(optimisation={"iterations": 1, "lr": 0.1, "weight_decay": decay})
        ends.append(feedback_of(run_training(tmp_path / str(decay), recipe).model)["block.ff.net.2.weight"])
    assert ends[1].norm() < 0.95 * ends[0].norm()  # by 1 - 0.1 * 0.9, less Adam's own step


def test_the_gradient_is_clipped_to_the_norm(tmp_path: Path) -> None:
    recipe = small_recipe(optimisation={"clip": 1e-3})
    training = Training(small_model(), recipe, small_stream(recipe), small_setup(tmp_path))
    facts, _ = training.step(training.stream.batches(start_iteration=1, rank=0, world=1))
    clipped = torch.nn.utils.get_total_norm([p.grad for p in training.model.feedback.parameters()])
    training.close()
    assert facts["grad_norm"] > 1e-3  # what is logged is the norm before
    assert clipped.item() == pytest.approx(1e-3, rel=1e-2)  # torch adds 1e-6 to the norm it divides by


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_trained_weights_and_moments_in_float32(
    tmp_path: Path, whole: Path, precision: str
) -> None:
    model = small_model()
    run_training(tmp_path, small_recipe(compute={"precision": precision}), model=model)
    assert {value.dtype for value in feedback_of(model).values()} == {torch.float32}
    moments = load_file(tmp_path / "steps" / f"{ITERATIONS:08d}" / "optimizer.safetensors")
    assert {value.dtype for value in moments.values()} == {torch.float32}
    assert {p.dtype for p in model.backbone.parameters()} == {torch.float32}  # the caller's stays as it was
    half, full = column(tmp_path, "loss"), column(whole, "loss")
    assert not torch.equal(half, full)
    assert torch.allclose(half, full, rtol=BF16_ROUNDING)


def test_the_backbone_that_runs_in_bfloat16_is_kept_in_it(tmp_path: Path) -> None:
    recipe = small_recipe(compute={"precision": "bf16"})
    training = Training(small_model(), recipe, small_stream(recipe), small_setup(tmp_path))
    training.close()
    assert {p.dtype for p in training.model.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in training.model.feedback.parameters()} == {torch.float32}


def test_optimizer_and_checkpoint_grow_with_the_block_and_not_with_the_backbone(tmp_path: Path) -> None:
    sizes = []
    for layers in (4, 16):
        folder = tmp_path / str(layers)
        recipe = small_recipe(optimisation={"iterations": 2})
        run_training(folder, recipe, model=attach(small_dit(num_layers=layers), LOOP))
        sizes.append({p.name: p.stat().st_size for p in (folder / "steps" / "00000002").glob("*.safetensors")})
    assert sizes[0] == sizes[1]


# --- the running mean


def test_the_running_mean_has_the_half_life_and_is_what_is_served(tmp_path: Path) -> None:
    half_life = 3.0
    weights = [feedback_of(small_model())]
    for iteration in range(1, ITERATIONS + 1):  # without a mean, stopped after each iteration
        run_training(tmp_path / "raw", stop_after=1)
        weights.append(load_file(tmp_path / "raw" / "steps" / f"{iteration:08d}" / "ilf.safetensors"))
    mean = weights[0]
    for now in weights[1:]:
        mean = {name: mean[name] * 0.5 ** (1 / half_life) + now[name] * (1 - 0.5 ** (1 / half_life)) for name in mean}
    result = run_training(tmp_path / "mean", small_recipe(optimisation={"ema": half_life}))
    last = tmp_path / "mean" / "steps" / f"{ITERATIONS:08d}"
    served, raw = load_file(last / "ilf.safetensors"), load_file(last / "raw.safetensors")
    assert equal(raw, weights[-1])
    assert all(torch.allclose(served[name], mean[name], **FLOAT32) for name in mean)
    assert not torch.allclose(served["scales"], raw["scales"], **FLOAT32)
    assert equal(feedback_of(result.model), served)
    assert equal(load_file(tmp_path / "mean" / "ilf.safetensors"), served)


def test_without_a_mean_there_are_no_raw_weights(whole: Path) -> None:
    assert list(whole.rglob("raw.safetensors")) == []


def test_validation_judges_the_running_mean(tmp_path: Path) -> None:
    recipe = small_recipe(optimisation={"ema": 1e9}, checkpoint={"metric": "validation", "every": ITERATIONS})
    run_training(tmp_path / "mean", recipe)  # so long a half-life that the mean stays where it began
    state = json.loads((tmp_path / "mean" / "steps" / f"{ITERATIONS:08d}" / "state.json").read_text())
    fresh = Training(small_model(), recipe, small_stream(recipe), small_setup(tmp_path))
    fresh.state.iteration = 1
    expected = fresh.measure()
    fresh.close()
    assert state["standing"]["best"] == pytest.approx(expected, rel=1e-6)  # the mean moved by 1e-9 of the way
