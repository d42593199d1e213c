"""Resuming: a training that stopped, failed or was killed goes on to the bit."""

import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ilf_trt.errors import CheckpointError, InvalidRequest
from ilf_trt.train.loop import Training
from tests.small_training import (
    ITERATIONS,
    Spoilt,
    assert_same_training,
    equal,
    log_of,
    run_training,
    small_model,
    small_recipe,
    small_setup,
    small_stream,
)


@pytest.mark.parametrize("iteration", range(1, ITERATIONS))
def test_a_training_stopped_at_any_iteration_goes_on_to_the_bit(tmp_path: Path, whole: Path, iteration: int) -> None:
    stopped = run_training(tmp_path, stop_after=iteration)
    assert stopped.outcome.stopped
    assert stopped.outcome.iteration == iteration
    result = run_training(tmp_path, model=small_model())
    assert list(result.losses) == list(range(iteration + 1, ITERATIONS + 1))
    assert_same_training(tmp_path, whole)


def test_stops_at_random_places_in_a_row_change_nothing(tmp_path: Path, whole: Path) -> None:
    moments = random.Random(3)
    while run_training(tmp_path, stop_after=moments.randint(1, 3)).outcome.stopped:
        pass
    assert_same_training(tmp_path, whole)


def test_bits_survive_a_stop_with_everything_on(tmp_path: Path) -> None:
    sections = {
        "optimisation": {"iterations": 4, "batch_size": 4, "accumulate": 2, "warm_up": 3, "ema": 2.0},
        "compute": {"precision": "fp16", "gradient_checkpointing": True},
        "checkpoint": {"metric": "validation", "validation_batches": 2, "every": 2},
    }
    recipe = small_recipe(**sections)
    run_training(tmp_path / "whole", recipe)
    run_training(tmp_path / "stopped", recipe, stop_after=2)
    run_training(tmp_path / "stopped", recipe)
    assert_same_training(tmp_path / "whole", tmp_path / "stopped")


def test_the_scaler_of_fp16_is_taken_up_again(tmp_path: Path) -> None:
    recipe = small_recipe(compute={"precision": "fp16"})
    training = Training(small_model(), recipe, small_stream(recipe), small_setup(tmp_path))
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 1024.0, "_growth_tracker": 7})
    training.step(training.stream.batches(start_iteration=1, rank=0, world=1))
    training.save()
    training.close()
    again = Training(small_model(), recipe, small_stream(recipe), small_setup(tmp_path))
    again.resume()
    again.close()
    assert (again.scaler.get_scale(), again.scaler.state_dict()["_growth_tracker"]) == (1024.0, 8)


@pytest.mark.parametrize(("first", "second"), [("bf16", "fp16"), ("fp16", "fp32")])
def test_precision_may_change_on_the_way(tmp_path: Path, first: str, second: str) -> None:
    run_training(tmp_path, small_recipe(compute={"precision": first}), stop_after=2)
    assert run_training(tmp_path, small_recipe(compute={"precision": second})).outcome.iteration == ITERATIONS


def test_a_later_run_may_have_more_iterations(copy: Path) -> None:
    result = run_training(copy, small_recipe(optimisation={"iterations": ITERATIONS + 2}))
    assert list(result.losses) == [ITERATIONS + 1, ITERATIONS + 2]


def test_fewer_iterations_than_were_trained_are_refused(copy: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"stands at iteration 6, past optimisation\.iterations 4"):
        run_training(copy, small_recipe(optimisation={"iterations": 4}))


def test_a_finished_training_run_again_writes_its_model_again(copy: Path, whole: Path) -> None:
    (copy / "ilf.safetensors").unlink()
    assert run_training(copy, model=small_model()).losses == {}
    assert equal(load_file(copy / "ilf.safetensors"), load_file(whole / "ilf.safetensors"))


def test_after_a_nan_the_last_checkpoint_and_the_log_are_whole(tmp_path: Path, whole: Path) -> None:
    recipe = small_recipe()
    with pytest.raises(InvalidRequest):
        run_training(tmp_path, recipe, stream=Spoilt(recipe, 6))
    assert [line["iteration"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5]
    run_training(tmp_path, recipe)
    assert_same_training(tmp_path, whole)


def test_a_full_disk_names_the_place_and_what_was_there_stays(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(tmp_path, stop_after=2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ilf_trt.train.checkpoints.write_tensors", full)
        with pytest.raises(CheckpointError, match=r"00000004: No space left on device; make room"):
            run_training(tmp_path)
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["00000002"]
    run_training(tmp_path)
    assert_same_training(tmp_path, whole)
