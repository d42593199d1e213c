"""The engine: what learns, what a seed fixes, ways to the same sum, and going on where it stopped, to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ilf_trt import attach, load_ilf
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.errors import InvalidRequest
from ilf_trt.model.checkpoint import fingerprint, read_checkpoint
from ilf_trt.train.loop import Training, facts_of
from tests.conftest import CLASSES, LOOP, small_dit, small_pixart
from tests.fitting_digests import change_json
from tests.small_training import (
    BATCH,
    FLOAT32,
    ITERATIONS,
    Spoilt,
    assert_same_training,
    column,
    dit_rows,
    equal,
    feedback_of,
    log_of,
    losses_of,
    pixart_rows,
    run_training,
    small_model,
    small_recipe,
    small_setup,
    small_stream,
)

# Measured 0.80 after 30 iterations, and 1.01 with rates of zero.
FALL = 0.9


# --- what learns


def test_the_loss_falls(tmp_path: Path) -> None:
    recipe = small_recipe(optimisation={"iterations": 30}, checkpoint={"every": 30})
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


@pytest.mark.parametrize("sized", [True, False])
def test_a_pixart_trains_too(tmp_path: Path, sized: bool) -> None:
    model = attach(small_pixart(sized=sized), LOOP)
    before = feedback_of(model)
    recipe = small_recipe(optimisation={"iterations": 2, "batch_size": 2}, loss={"condition_dropout": 0.0})
    run_training(tmp_path, recipe, model=model, stream=small_stream(recipe, pixart_rows(4, sized=sized)))
    assert [name for name, value in feedback_of(model).items() if torch.equal(value, before[name])] == []


def test_dropped_conditions_are_the_backbone_s_null_class(tmp_path: Path) -> None:
    conditions: list[Tensor] = []
    model = small_model()
    recipe = small_recipe(loss={"condition_dropout": 1.0}, optimisation={"iterations": 1})
    training = Training(model, recipe, small_stream(recipe), small_setup(tmp_path))
    training.objective.register_forward_pre_hook(
        lambda _, inputs: conditions.append(inputs[0].conditions["class_labels"])
    )
    training.step(training.stream.batches(start_iteration=1, rank=0, world=1))
    training.close()
    assert torch.equal(conditions[0], torch.full((BATCH,), CLASSES))


def test_dropped_conditions_are_the_data_s_null_where_the_backbone_has_none(tmp_path: Path) -> None:
    null = {"text": torch.full((1, 7, 32), 9.0), "text_mask": torch.ones(1, 7)}
    recipe = small_recipe(loss={"condition_dropout": 1.0}, optimisation={"iterations": 1, "batch_size": 2})
    stream = small_stream(recipe, pixart_rows(4), null=null)
    training = Training(attach(small_pixart(sized=True), LOOP), recipe, stream, small_setup(tmp_path))
    conditions: list[Tensor] = []
    training.objective.register_forward_pre_hook(lambda _, inputs: conditions.append(inputs[0].conditions["text"]))
    training.step(stream.batches(start_iteration=1, rank=0, world=1))
    training.close()
    assert torch.equal(conditions[0], torch.full((2, 7, 32), 9.0))


def test_condition_dropout_without_a_null_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(optimisation={"batch_size": 2})
    model = attach(small_pixart(sized=True), LOOP)
    with pytest.raises(InvalidRequest, match=r"no embedding of the empty text.*condition_dropout=0"):
        run_training(tmp_path, recipe, model=model, stream=small_stream(recipe, pixart_rows(4)))


def test_a_base_that_predicts_velocity_is_refused(tmp_path: Path) -> None:
    scheduler = {**DEFAULT_SCHEDULER, "prediction_type": "v_prediction"}
    with pytest.raises(InvalidRequest, match="predicts 'v_prediction'"):
        run_training(tmp_path, scheduler=scheduler)


# --- what a seed fixes


SHORT = {"iterations": 2, "batch_size": 4}


def test_a_seed_gives_the_same_again_whatever_torch_drew_before(tmp_path: Path, whole: Path) -> None:
    model = small_model()
    torch.manual_seed(101)
    run_training(tmp_path, model=model)
    assert_same_training(tmp_path, whole)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights after a short training."""
    return feedback_of(run_training(tmp_path_factory.mktemp("short"), small_recipe(optimisation=SHORT)).model)


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
def test_another_recipe_gives_other_weights(tmp_path: Path, short: dict[str, Tensor], change: dict[str, Any]) -> None:
    recipe = small_recipe(**{**change, "optimisation": {**SHORT, **change.get("optimisation", {})}})
    assert not equal(short, feedback_of(run_training(tmp_path, recipe).model))


def test_the_facts_of_the_checkpoint_are_the_recipe_and_the_mean_loss(tmp_path: Path) -> None:
    recipe = small_recipe()
    result = run_training(tmp_path, recipe)
    facts = read_checkpoint(tmp_path).training
    assert facts == facts_of(recipe, result.outcome)
    assert facts["mean_loss"] == pytest.approx(losses_of(result.losses).mean().item(), rel=1e-6)  # one more rounding
    assert (facts["iteration"], facts["seed"], facts["loss"]["kind"]) == (ITERATIONS, 0, "fast")


def test_the_output_is_an_ilf_checkpoint_of_the_trained_model(tmp_path: Path) -> None:
    result = run_training(tmp_path / "out")
    small_dit().save_pretrained(tmp_path / "base")
    sha256 = fingerprint(small_dit())
    change_json(tmp_path / "out" / "ilf.json", lambda facts: facts["base"].update(sha256=sha256))
    loaded = load_ilf(tmp_path / "out", base=tmp_path / "base")
    assert equal(feedback_of(loaded), feedback_of(result.model))


# --- ways to the same sum


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path, whole: Path) -> None:
    run_training(tmp_path, small_recipe(optimisation={"accumulate": 4}))
    assert torch.allclose(column(whole, "loss"), column(tmp_path, "loss"), **FLOAT32)
    # AdamW's steps hide a gradient of another size, its norm does not; they amplify the rounding of small gradients.
    assert torch.allclose(column(whole, "grad_norm"), column(tmp_path, "grad_norm"), rtol=1e-3)


def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, whole: Path) -> None:
    run_training(tmp_path, small_recipe(compute={"gradient_checkpointing": True}))
    assert_same_training(tmp_path, whole)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"batch_size is 8, it must divide by 1 .*accumulate 3; take 6"):
        run_training(tmp_path, small_recipe(optimisation={"accumulate": 3}))


def test_the_rates_warm_up_and_stay(tmp_path: Path) -> None:
    run_training(tmp_path, small_recipe(optimisation={"warm_up": 4, "lr": 1e-3}))
    assert [line["lr"] for line in log_of(tmp_path)] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_the_first_step_of_a_warm_up_is_a_share_of_the_rate(tmp_path: Path) -> None:
    recipe = small_recipe(optimisation={"iterations": 1, "warm_up": 4, "scale_lr": 0.04})
    scales = feedback_of(run_training(tmp_path, recipe).model)["scales"]
    assert torch.allclose(scales.abs(), torch.full((2,), 0.01), rtol=1e-3)  # Adam's first step is the rate


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


def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale(tmp_path: Path) -> None:
    recipe = small_recipe(compute={"precision": "fp16"})
    training = Training(small_model(), recipe, small_stream(recipe), small_setup(tmp_path))
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0**127})
    before = feedback_of(training.model)
    facts, _ = training.step(training.stream.batches(start_iteration=1, rank=0, world=1))
    training.close()
    assert not torch.isfinite(torch.tensor(facts["grad_norm"]))
    assert equal(before, feedback_of(training.model))
    assert training.scaler.get_scale() == 2.0**126


def test_a_stream_at_another_iteration_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe()
    training = Training(small_model(), recipe, small_stream(recipe), small_setup(tmp_path))
    with pytest.raises(InvalidRequest, match="the data gives iteration 3, expected 1"):
        training.step(training.stream.batches(start_iteration=3, rank=0, world=1))
    training.close()


def test_determinism_is_asked_of_torch_for_the_time_of_a_training_only(tmp_path: Path) -> None:
    flags: list[bool] = []
    stream = small_stream(small_recipe())
    batches = stream.batches

    def note_flag(**options: Any) -> Any:
        flags.append(torch.are_deterministic_algorithms_enabled())
        return batches(**options)

    stream.batches = note_flag  # type: ignore[method-assign]
    for enabled in (True, False):
        recipe = small_recipe(compute={"deterministic": enabled}, optimisation={"iterations": 1})
        run_training(tmp_path / str(enabled), recipe, stream=stream)
    assert flags == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


# --- what goes wrong


def test_a_loss_of_nan_stops_with_the_iteration_and_the_row(tmp_path: Path) -> None:
    recipe, model = small_recipe(), small_model()
    (bad,) = [keys[2] for i, keys, _ in [next(small_stream(recipe).batches(start_iteration=4, rank=0, world=1))]]
    with pytest.raises(InvalidRequest, match=rf"loss is nan at iteration 4, in {bad}; look at these rows"):
        run_training(tmp_path, recipe, model=model, stream=Spoilt(recipe, 4))
    run_training(tmp_path / "three", small_recipe(checkpoint={"every": 3}), stop_after=3)
    assert equal(feedback_of(model), load_file(tmp_path / "three" / "steps" / "00000003" / "ilf.safetensors"))


def test_the_row_is_named_when_parts_accumulate(tmp_path: Path) -> None:
    recipe = small_recipe(optimisation={"accumulate": 4})
    _, keys, _ = next(small_stream(recipe).batches(start_iteration=2, rank=0, world=1))
    with pytest.raises(InvalidRequest, match=rf"at iteration 2, in {keys[2]};"):
        run_training(tmp_path, recipe, stream=Spoilt(recipe, 2))


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


# --- what is kept and shown


def test_the_best_is_the_checkpoint_with_the_lowest_metric(tmp_path: Path) -> None:
    recipe = small_recipe(checkpoint={"every": 1, "keep": 1}, optimisation={"iterations": 8})
    result = run_training(tmp_path, recipe)
    best = min(result.losses, key=result.losses.__getitem__)
    assert (tmp_path / "best").resolve() == tmp_path / "steps" / f"{best:08d}"
    assert {int(path.name) for path in (tmp_path / "steps").iterdir()} == {best, 8}


def test_the_loss_metric_is_the_mean_since_the_last_checkpoint(tmp_path: Path) -> None:
    result = run_training(tmp_path, small_recipe(checkpoint={"every": 3}))
    windows = [losses_of(result.losses)[:3].mean().item(), losses_of(result.losses)[3:].mean().item()]
    state = json.loads((tmp_path / "steps" / "00000006" / "state.json").read_text())
    assert state["standing"]["best"] == pytest.approx(min(windows), rel=1e-6)


def test_validation_uses_its_own_stream_and_the_same_draws_every_time(tmp_path: Path) -> None:
    recipe = small_recipe(checkpoint={"metric": "validation", "every": 2}, optimisation={"lr": 0.0, "scale_lr": 0.0})
    opened: list[int] = []

    class Noted:
        null = None

        def batches(self, *, start_iteration: int, rank: int, world: int) -> Any:
            opened.append(start_iteration)
            return small_stream(recipe, dit_rows(9)).batches(start_iteration=start_iteration, rank=rank, world=world)

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
    run_training(tmp_path, recipe, model=model, stream=small_stream(recipe, pixart_rows(2)))
    assert "no sample grids" in caplog.text
    assert not (tmp_path / "samples").exists()
