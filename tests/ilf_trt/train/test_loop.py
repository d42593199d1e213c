"""The engine: what learns, what a seed fixes, ways to the same sum, and going on where it stopped, to the bit."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ilf_trt import attach, load_ilf
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.errors import CheckpointError, InvalidRequest
from ilf_trt.model.checkpoint import read_checkpoint, save_ilf
from ilf_trt.train.loop import Training, facts_of, new_optimizer
from tests.conftest import CLASSES, LOOP, small_dit, small_pixart
from tests.small_training import (
    BATCH,
    ITERATIONS,
    Spoilt,
    assert_same_training,
    dit_rows,
    equal,
    feedback_of,
    log_of,
    pixart_rows,
    run_training,
    small_feed,
    small_model,
    small_recipe,
    small_setting,
)

# The same sums of float32 products in another order, through six steps of AdamW at a rate of 1e-3.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
# Measured 0.80 after 30 iterations, and 1.01 with rates of zero.
FALL = 0.9
# bfloat16 keeps 8 bits, so matrix products are off by about 1 % of their size.
BF16_ROUNDING = 0.02


def losses_of(losses: dict[int, float]) -> Tensor:
    return torch.tensor(list(losses.values()))


# --- what learns


def test_the_loss_falls(tmp_path: Path) -> None:
    recipe = small_recipe(optimisation={"iterations": 30}, logging={"every": 30}, checkpoint={"every": 30})
    losses = losses_of(run_training(tmp_path, recipe).losses)
    assert len(losses) == 30
    assert losses[-8:].mean() < FALL * losses[:8].mean()


def test_only_the_feedback_changes_and_all_of_it(tmp_path: Path) -> None:
    model = small_model()
    backbone, before = {n: x.clone() for n, x in model.backbone.state_dict().items()}, feedback_of(model)
    run_training(tmp_path, model=model)
    assert equal(backbone, dict(model.backbone.state_dict()))
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert [name for name, value in feedback_of(model).items() if torch.equal(value, before[name])] == []


def test_the_optimizer_holds_feedback_and_scales_alone() -> None:
    model = small_model()
    optimizer = new_optimizer(model, small_recipe())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.feedback.parameters()}


@pytest.mark.parametrize("sized", [True, False])
def test_a_pixart_trains_too(tmp_path: Path, sized: bool) -> None:
    model = attach(small_pixart(sized=sized), LOOP)
    before = feedback_of(model)
    recipe = small_recipe(optimisation={"iterations": 2, "batch_size": 2}, loss={"condition_dropout": 0.0})
    run_training(tmp_path, recipe, model=model, feed=small_feed(recipe, pixart_rows(4, sized=sized)))
    assert [name for name, value in feedback_of(model).items() if torch.equal(value, before[name])] == []


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


def test_dropped_conditions_are_the_backbone_s_null_class(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    model = small_model()
    recipe = small_recipe(loss={"condition_dropout": 1.0}, optimisation={"iterations": 1})
    training = Training(model, recipe, small_feed(recipe), small_setting(tmp_path))
    training.objective.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].call["class_labels"]))
    training.step(training.feed.stream(start_iteration=1, rank=0, world=1))
    training.close()
    assert torch.equal(seen[0], torch.full((BATCH,), CLASSES))


def test_dropped_conditions_are_the_data_s_null_where_the_backbone_has_none(tmp_path: Path) -> None:
    null = {"encoder_hidden_states": torch.full((1, 7, 32), 9.0), "encoder_attention_mask": torch.ones(1, 7)}
    recipe = small_recipe(loss={"condition_dropout": 1.0}, optimisation={"iterations": 1, "batch_size": 2})
    feed = small_feed(recipe, pixart_rows(4), null=null)
    training = Training(attach(small_pixart(sized=True), LOOP), recipe, feed, small_setting(tmp_path))
    seen: list[Tensor] = []
    training.objective.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].call["encoder_hidden_states"]))
    training.step(feed.stream(start_iteration=1, rank=0, world=1))
    training.close()
    assert torch.equal(seen[0], torch.full((2, 7, 32), 9.0))


def test_condition_dropout_without_a_null_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(optimisation={"batch_size": 2})
    model = attach(small_pixart(sized=True), LOOP)
    with pytest.raises(InvalidRequest, match=r"no text that says nothing.*condition_dropout=0"):
        run_training(tmp_path, recipe, model=model, feed=small_feed(recipe, pixart_rows(4)))


def test_a_base_that_predicts_velocity_is_refused(tmp_path: Path) -> None:
    scheduler = {**DEFAULT_SCHEDULER, "prediction_type": "v_prediction"}
    with pytest.raises(InvalidRequest, match="predicts 'v_prediction'"):
        run_training(tmp_path, scheduler=scheduler)


# --- what a seed fixes


def test_a_seed_gives_the_same_again_whatever_was_drawn_before(tmp_path: Path) -> None:
    for name, state in (("a", 100), ("b", 101)):
        torch.manual_seed(state)
        run_training(tmp_path / name, model=small_model())
    assert_same_training(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"loss": {"kind": "none"}},
        {"loss": {"kind": "standard", "teacher_steps": 2}},
        {"loss": {"second_pass": "t/2"}},
        {"loss": {"reconstruction": 0.5}},
        {"loss": {"condition_dropout": 0.9}},
        {"optimisation": {"warm_up": 9}},
        {"optimisation": {"clip": 1e-9}},
    ],
    ids=str,
)
def test_another_recipe_gives_other_weights(tmp_path: Path, change: dict[str, Any]) -> None:
    short = {"iterations": 2, "batch_size": 4}
    change = {**change, "optimisation": {**short, **change.get("optimisation", {})}}
    plain = run_training(tmp_path / "plain", small_recipe(optimisation=short))
    changed = run_training(tmp_path / "changed", small_recipe(**change))
    assert not equal(feedback_of(plain.model), feedback_of(changed.model))


def test_the_facts_of_the_checkpoint_are_the_recipe_and_the_mean_loss(tmp_path: Path) -> None:
    recipe = small_recipe()
    ran = run_training(tmp_path, recipe)
    facts = read_checkpoint(tmp_path).training
    assert facts == facts_of(recipe, ran.outcome)
    assert facts["mean_loss"] == pytest.approx(losses_of(ran.losses).mean().item(), rel=1e-6)  # one more rounding
    assert (facts["iteration"], facts["seed"], facts["loss"]["kind"]) == (ITERATIONS, 0, "fast")


def test_the_output_is_an_ilf_checkpoint_of_the_trained_model(tmp_path: Path) -> None:
    ran = run_training(tmp_path / "out")
    small_dit().save_pretrained(tmp_path / "base")
    facts = json.loads((tmp_path / "out" / "ilf.json").read_text())
    save_ilf(small_model(), tmp_path / "own")
    facts["base"]["sha256"] = json.loads((tmp_path / "own" / "ilf.json").read_text())["base"]["sha256"]
    (tmp_path / "out" / "ilf.json").write_text(json.dumps(facts))
    loaded = load_ilf(tmp_path / "out", base=tmp_path / "base")
    assert equal(feedback_of(loaded), feedback_of(ran.model))


# --- ways to the same sum


def final(tmp_path: Path, name: str, **sections: Any) -> tuple[Tensor, Tensor]:
    """Losses, and trained weights as one row."""
    ran = run_training(tmp_path / name, small_recipe(**sections))
    return losses_of(ran.losses), torch.cat([value.flatten() for value in feedback_of(ran.model).values()])


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    # AdamW's steps hide a gradient of another size, its norm does not.
    one, four = (final(tmp_path, str(n), optimisation={"accumulate": n}) for n in (1, 4))
    assert torch.allclose(one[0], four[0], **FLOAT32)
    norms = [torch.tensor([line["grad_norm"] for line in log_of(tmp_path / str(n))]) for n in (1, 4)]
    assert torch.allclose(*norms, rtol=1e-3)  # Adam turns the rounding of small gradients into steps


def test_gradient_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    for name, wanted in (("a", False), ("b", True)):
        run_training(tmp_path / name, small_recipe(compute={"gradient_checkpointing": wanted}))
    assert_same_training(tmp_path / "a", tmp_path / "b")


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"batch_size is 8, it must divide by 1 .*accumulate 3; take 6"):
        run_training(tmp_path, small_recipe(optimisation={"accumulate": 3}))


def test_the_gradient_is_clipped_to_the_norm(tmp_path: Path) -> None:
    recipe = small_recipe(optimisation={"clip": 1e-3})
    training = Training(small_model(), recipe, small_feed(recipe), small_setting(tmp_path))
    facts, _ = training.step(training.feed.stream(start_iteration=1, rank=0, world=1))
    clipped = torch.nn.utils.get_total_norm([p.grad for p in training.model.feedback.parameters()])
    training.close()
    assert facts["grad_norm"] > 1e-3  # what is logged is the norm before
    assert clipped.item() == pytest.approx(1e-3, rel=1e-2)  # torch adds 1e-6 to the norm it divides by


def test_the_rates_warm_up_and_stay(tmp_path: Path) -> None:
    run_training(tmp_path, small_recipe(optimisation={"warm_up": 4, "lr": 1e-3}))
    assert [line["lr"] for line in log_of(tmp_path)] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_the_first_step_of_a_warm_up_is_a_share_of_the_rate(tmp_path: Path) -> None:
    recipe = small_recipe(optimisation={"iterations": 1, "warm_up": 4, "scale_lr": 0.04})
    scales = feedback_of(run_training(tmp_path, recipe).model)["scales"]
    assert torch.allclose(scales.abs(), torch.full((2,), 0.01), rtol=1e-3)  # Adam's first step is the rate


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_what_learns_and_the_moments_in_float32(tmp_path: Path, precision: str) -> None:
    model = small_model()
    plain, half = (
        run_training(tmp_path / p, small_recipe(compute={"precision": p}), model=m)
        for p, m in (("fp32", small_model()), (precision, model))
    )
    assert {value.dtype for value in feedback_of(half.model).values()} == {torch.float32}
    moments = load_file(tmp_path / precision / "steps" / f"{ITERATIONS:08d}" / "optimizer.safetensors")
    assert {value.dtype for value in moments.values()} == {torch.float32}
    assert {p.dtype for p in model.backbone.parameters()} == {torch.float32}  # the caller's stays as it was
    assert not torch.equal(losses_of(half.losses), losses_of(plain.losses))
    assert torch.allclose(losses_of(half.losses), losses_of(plain.losses), rtol=BF16_ROUNDING)


def test_the_backbone_that_runs_in_bfloat16_is_kept_in_it(tmp_path: Path) -> None:
    recipe = small_recipe(compute={"precision": "bf16"})
    training = Training(small_model(), recipe, small_feed(recipe), small_setting(tmp_path))
    training.close()
    assert {p.dtype for p in training.model.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in training.model.feedback.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
def test_compiled_blocks_are_few_graphs_with_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []

    def counting(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counting, **options))
    short = {"optimisation": {"iterations": 2}}
    model = small_model()
    compiled = run_training(tmp_path / "a", small_recipe(**short, compute={"compile": True}), model=model)
    plain = run_training(tmp_path / "b", small_recipe(**short))
    assert len(graphs) == 3  # nothing to record; weights that learn; frozen ones behind them
    assert torch.allclose(losses_of(compiled.losses), losses_of(plain.losses), **FLOAT32)
    assert "block" not in vars(model.adapter)  # the caller's model is not compiled


# --- going on


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    run_training(folder)
    return folder


@pytest.mark.parametrize("iteration", range(1, ITERATIONS))
def test_a_training_stopped_at_any_iteration_goes_on_to_the_bit(tmp_path: Path, whole: Path, iteration: int) -> None:
    stopped = run_training(tmp_path, stop_after=iteration)
    assert stopped.outcome.stopped
    assert stopped.outcome.iteration == iteration
    ran = run_training(tmp_path, model=small_model())
    assert list(ran.losses) == list(range(iteration + 1, ITERATIONS + 1))
    assert_same_training(tmp_path, whole)


def test_bits_survive_a_stop_with_everything_on(tmp_path: Path) -> None:
    sections = {
        "optimisation": {"accumulate": 2, "warm_up": 5, "ema": 2.0},
        "compute": {"precision": "fp16", "gradient_checkpointing": True},
        "checkpoint": {"metric": "validation", "validation_batches": 2, "every": 3},
    }
    recipe = small_recipe(**sections)
    run_training(tmp_path / "whole", recipe)
    run_training(tmp_path / "stopped", recipe, stop_after=3)
    run_training(tmp_path / "stopped", recipe)
    assert_same_training(tmp_path / "whole", tmp_path / "stopped")


def test_the_scaler_of_fp16_is_taken_up_again(tmp_path: Path) -> None:
    recipe = small_recipe(compute={"precision": "fp16"})
    training = Training(small_model(), recipe, small_feed(recipe), small_setting(tmp_path))
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 1024.0, "_growth_tracker": 7})
    stream = training.feed.stream(start_iteration=1, rank=0, world=1)
    training.step(stream)
    training.save()
    training.close()
    again = Training(small_model(), recipe, small_feed(recipe), small_setting(tmp_path))
    again.resume()
    again.close()
    assert (again.scaler.get_scale(), again.scaler.state_dict()["_growth_tracker"]) == (1024.0, 8)


def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale(tmp_path: Path) -> None:
    recipe = small_recipe(compute={"precision": "fp16"})
    training = Training(small_model(), recipe, small_feed(recipe), small_setting(tmp_path))
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0**127})
    before = feedback_of(training.model)
    facts, _ = training.step(training.feed.stream(start_iteration=1, rank=0, world=1))
    training.close()
    assert not torch.isfinite(torch.tensor(facts["grad_norm"]))
    assert equal(before, feedback_of(training.model))
    assert training.scaler.get_scale() == 2.0**126


@pytest.mark.parametrize(("first", "second"), [("bf16", "fp16"), ("fp16", "fp32")])
def test_precision_may_change_on_the_way(tmp_path: Path, first: str, second: str) -> None:
    run_training(tmp_path, small_recipe(compute={"precision": first}), stop_after=2)
    assert run_training(tmp_path, small_recipe(compute={"precision": second})).outcome.iteration == ITERATIONS


def test_more_iterations_may_be_asked_for_later(tmp_path: Path) -> None:
    run_training(tmp_path)
    ran = run_training(tmp_path, small_recipe(optimisation={"iterations": ITERATIONS + 2}))
    assert list(ran.losses) == [ITERATIONS + 1, ITERATIONS + 2]


def test_fewer_iterations_than_were_trained_are_refused(tmp_path: Path) -> None:
    run_training(tmp_path)
    with pytest.raises(InvalidRequest, match=r"stands at iteration 6, past optimisation\.iterations 4"):
        run_training(tmp_path, small_recipe(optimisation={"iterations": 4}))


def test_a_finished_training_run_again_writes_its_model_again(tmp_path: Path, whole: Path) -> None:
    run_training(tmp_path)
    (tmp_path / "ilf.safetensors").unlink()
    assert run_training(tmp_path, model=small_model()).losses == {}
    assert equal(load_file(tmp_path / "ilf.safetensors"), load_file(whole / "ilf.safetensors"))


def test_a_feed_that_stands_elsewhere_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe()
    training = Training(small_model(), recipe, small_feed(recipe), small_setting(tmp_path))
    with pytest.raises(InvalidRequest, match="the data gives iteration 3, expected 1"):
        training.step(training.feed.stream(start_iteration=3, rank=0, world=1))
    training.close()


def test_determinism_is_asked_of_torch_for_the_time_of_a_training_only(tmp_path: Path) -> None:
    seen: list[bool] = []
    feed = small_feed(small_recipe())
    stream = feed.stream

    def noted(**options: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return stream(**options)

    feed.stream = noted  # type: ignore[method-assign]
    for wanted in (True, False):
        run_training(tmp_path / str(wanted), small_recipe(compute={"deterministic": wanted}), feed=feed)
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


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
    ran = run_training(tmp_path / "mean", small_recipe(optimisation={"ema": half_life}))
    last = tmp_path / "mean" / "steps" / f"{ITERATIONS:08d}"
    served, raw = load_file(last / "ilf.safetensors"), load_file(last / "raw.safetensors")
    assert equal(raw, weights[-1])
    assert all(torch.allclose(served[name], mean[name], **FLOAT32) for name in mean)
    assert not torch.allclose(served["scales"], raw["scales"], **FLOAT32)
    assert equal(feedback_of(ran.model), served)
    assert equal(load_file(tmp_path / "mean" / "ilf.safetensors"), served)


def test_without_a_mean_no_raw_weights_lie_beside(tmp_path: Path) -> None:
    run_training(tmp_path)
    assert list(tmp_path.rglob("raw.safetensors")) == []


def test_validation_judges_the_running_mean(tmp_path: Path) -> None:
    recipe = small_recipe(optimisation={"ema": 1e9}, checkpoint={"metric": "validation", "every": ITERATIONS})
    run_training(tmp_path / "mean", recipe)  # so long a half-life that the mean stays where it began
    state = json.loads((tmp_path / "mean" / "steps" / f"{ITERATIONS:08d}" / "state.json").read_text())
    fresh = Training(small_model(), recipe, small_feed(recipe), small_setting(tmp_path))
    fresh.standing.iteration = 1
    expected = fresh.measure()
    fresh.close()
    assert state["standing"]["best"] == pytest.approx(expected, rel=1e-6)  # the mean moved by 1e-9 of the way


# --- what goes wrong


def test_a_loss_of_nan_stops_with_the_iteration_and_the_row(tmp_path: Path) -> None:
    recipe, model = small_recipe(), small_model()
    (bad,) = [keys[2] for i, keys, _ in [next(small_feed(recipe).stream(start_iteration=4, rank=0, world=1))]]
    with pytest.raises(InvalidRequest, match=rf"loss is nan at iteration 4, in {bad}; look at these rows"):
        run_training(tmp_path, recipe, model=model, feed=Spoilt(recipe, 4))
    run_training(tmp_path / "three", small_recipe(checkpoint={"every": 3}), stop_after=3)
    assert equal(feedback_of(model), load_file(tmp_path / "three" / "steps" / "00000003" / "ilf.safetensors"))


def test_the_row_is_named_when_parts_accumulate(tmp_path: Path) -> None:
    recipe = small_recipe(optimisation={"accumulate": 4})
    _, keys, _ = next(small_feed(recipe).stream(start_iteration=2, rank=0, world=1))
    with pytest.raises(InvalidRequest, match=rf"at iteration 2, in {keys[2]};"):
        run_training(tmp_path, recipe, feed=Spoilt(recipe, 2))


def test_after_a_nan_the_last_checkpoint_and_the_log_are_whole(tmp_path: Path, whole: Path) -> None:
    recipe = small_recipe()
    with pytest.raises(InvalidRequest):
        run_training(tmp_path, recipe, feed=Spoilt(recipe, 6))
    assert [line["iteration"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5]
    run_training(tmp_path, recipe)
    assert_same_training(tmp_path, whole)


@pytest.mark.parametrize("value", [1e30, float("inf")])
def test_an_infinite_loss_stops(tmp_path: Path, value: float) -> None:
    backbone = small_dit()
    with torch.no_grad():
        backbone.proj_out_2.weight.mul_(value)
    with pytest.raises(InvalidRequest, match=r"loss is (inf|nan) at iteration 1, in "):
        run_training(tmp_path, model=attach(backbone, LOOP))


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    model = small_model()
    model.feedback.scales.register_hook(lambda gradient: gradient * float("nan"))
    before = feedback_of(model)
    with pytest.raises(InvalidRequest, match="gradient's norm is nan at iteration 1"):
        run_training(tmp_path, model=model)
    assert equal(before, feedback_of(model))


def test_a_full_disk_names_the_place_and_what_was_there_stays(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(tmp_path, stop_after=2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ilf_trt.train.checkpoints.save_file", full)
        with pytest.raises(CheckpointError, match=r"00000004: No space left on device; make room"):
            run_training(tmp_path)
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["00000002"]
    run_training(tmp_path)
    assert_same_training(tmp_path, whole)


# --- what is kept and shown


def test_the_best_is_the_checkpoint_with_the_lowest_metric(tmp_path: Path) -> None:
    recipe = small_recipe(checkpoint={"every": 1, "keep": 1}, optimisation={"iterations": 8})
    ran = run_training(tmp_path, recipe)
    best = min(ran.losses, key=ran.losses.__getitem__)
    assert (tmp_path / "best").resolve() == tmp_path / "steps" / f"{best:08d}"
    assert {int(path.name) for path in (tmp_path / "steps").iterdir()} == {best, 8}


def test_the_loss_metric_is_the_mean_since_the_last_checkpoint(tmp_path: Path) -> None:
    ran = run_training(tmp_path, small_recipe(checkpoint={"every": 3}))
    windows = [losses_of(ran.losses)[:3].mean().item(), losses_of(ran.losses)[3:].mean().item()]
    state = json.loads((tmp_path / "steps" / "00000006" / "state.json").read_text())
    assert state["standing"]["best"] == pytest.approx(min(windows), rel=1e-6)


def test_validation_uses_its_own_feed_and_the_same_draws_every_time(tmp_path: Path) -> None:
    recipe = small_recipe(checkpoint={"metric": "validation", "every": 2}, optimisation={"lr": 0.0, "scale_lr": 0.0})
    opened: list[int] = []

    class Noted:
        null = None

        def stream(self, *, start_iteration: int, rank: int, world: int) -> Any:
            opened.append(start_iteration)
            return small_feed(recipe, dit_rows(9)).stream(start_iteration=start_iteration, rank=rank, world=world)

    run_training(tmp_path, recipe, validation=Noted())
    assert opened == [1, 1, 1]
    state = json.loads((tmp_path / "steps" / "00000006" / "state.json").read_text())
    assert state["standing"]["best_iteration"] == 2  # nothing learns, so no later one is better


def test_sample_grids_are_written_at_their_iterations(tmp_path: Path) -> None:
    model = attach(small_dit(out_channels=1), LOOP)
    recipe = small_recipe(logging={"samples_every": 4, "steps": 2})
    run_training(tmp_path, recipe, model=model, labels=(0, 1, 2))
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["00000004.png", "00000006.png"]


def test_sample_grids_of_latents_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = small_recipe(
        logging={"samples_every": 1}, optimisation={"iterations": 1, "batch_size": 2}, loss={"condition_dropout": 0.0}
    )
    model = attach(small_pixart(sized=True), LOOP)
    run_training(tmp_path, recipe, model=model, feed=small_feed(recipe, pixart_rows(2)))
    assert "no sample grids" in caplog.text
    assert not (tmp_path / "samples").exists()


def test_optimizer_and_checkpoint_grow_with_the_block_and_not_with_the_backbone(tmp_path: Path) -> None:
    sizes = []
    for layers in (4, 16):
        folder = tmp_path / str(layers)
        recipe = small_recipe(optimisation={"iterations": 2})
        run_training(folder, recipe, model=attach(small_dit(num_layers=layers), LOOP))
        sizes.append({p.name: p.stat().st_size for p in (folder / "steps" / "00000002").glob("*.safetensors")})
    assert sizes[0] == sizes[1]


def test_stops_at_random_places_in_a_row_change_nothing(tmp_path: Path, whole: Path) -> None:
    chosen = random.Random(3)
    while run_training(tmp_path, stop_after=chosen.randint(1, 3)).outcome.stopped:
        pass
    assert_same_training(tmp_path, whole)
