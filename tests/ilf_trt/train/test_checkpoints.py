"""The state of a training: whole or not there, the last few and the best, and refusals of what does not fit."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ilf_trt.errors import CheckpointError, InvalidRequest
from ilf_trt.train.checkpoints import Base, Checkpoints, TrainingState
from ilf_trt.train.weights import new_optimizer
from tests.fitting_digests import change_json, change_tensors
from tests.small_training import BASE, assert_same_training, equal, feedback_of, run_training, small_model, small_recipe

ITERATIONS = 6
NO_PROCESS = 2**22 + 1  # above the largest process id of Linux


def last(folder: Path) -> Path:
    return folder / "steps" / f"{ITERATIONS:08d}"


def checkpoints(folder: Path, keep: int = 2, base: Base = BASE) -> Checkpoints:
    return Checkpoints(folder, small_recipe(checkpoint={"keep": keep}), base)


def save(folder: Path, iteration: int, keep: int = 2, best: int = 0) -> None:
    model = small_model()
    state = TrainingState(iteration=iteration, best=0.5 if best else None, best_iteration=best)
    checkpoints(folder, keep).save(state, model, new_optimizer(model, small_recipe()), {}, served_model=model)


def load(folder: Path, path: Path | None = None, base: Base = BASE) -> TrainingState:
    model = small_model()
    optimizer = new_optimizer(model, small_recipe())
    state, _ = checkpoints(folder, base=base).load(path or last(folder), model, optimizer, served_model=model)
    return state


def names(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "steps").iterdir())


# --- whole or absent


def test_a_full_disk_is_a_readable_error_and_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ilf_trt.train.checkpoints.write_tensors", full)
    with pytest.raises(CheckpointError, match=r"00000001: No space left on device; make room there.*--resume auto"):
        save(tmp_path, 1)
    assert list((tmp_path / "steps").iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_readable_error(tmp_path: Path) -> None:
    (tmp_path / "steps").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        save(tmp_path, 1)


def test_a_checkpoint_takes_the_place_of_the_same_iteration(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1)
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["00000001"]


# --- the last few and the best


def test_the_last_k_and_the_best_are_kept(tmp_path: Path) -> None:
    for iteration in (1, 2, 3, 4, 5):
        save(tmp_path, iteration, keep=2, best=1)
    assert names(tmp_path) == [1, 4, 5]
    assert (tmp_path / "best").resolve() == tmp_path / "steps" / "00000001"


def test_the_best_link_follows_the_best(tmp_path: Path) -> None:
    save(tmp_path, 1, best=1)
    save(tmp_path, 2, best=2)
    assert (tmp_path / "best").readlink() == Path("steps/00000002")
    save(tmp_path, 3, keep=1, best=2)
    assert names(tmp_path) == [2, 3]


def test_what_a_dead_process_left_is_not_taken_and_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / "steps" / f".00000002.partial-0a1b2c3d-{NO_PROCESS}"
    half.mkdir()
    (half / "ilf.json").write_text("{")
    (tmp_path / f".best.partial-0a1b2c3d-{NO_PROCESS}").symlink_to("steps/00000001")
    (tmp_path / f".ilf.json.partial-0a1b2c3d-{NO_PROCESS}").write_text("{")
    assert checkpoints(tmp_path).resume_point("auto") == tmp_path / "steps" / "00000001"
    checkpoints(tmp_path).tidy(TrainingState(iteration=1))
    assert [path.name for path in tmp_path.iterdir()] == ["steps"]
    assert names(tmp_path) == [1]
    assert (tmp_path / "steps" / "00000001" / "ilf.json").is_file()


def test_a_checkpoint_holds_the_feedback_and_its_moments_and_nothing_of_the_backbone(whole: Path) -> None:
    files = {path.name for path in last(whole).iterdir()}
    assert files == {"ilf.json", "ilf.safetensors", "optimizer.safetensors", "state.json"}
    parameters = dict(small_model().feedback.named_parameters())
    assert load_file(last(whole) / "ilf.safetensors").keys() == parameters.keys()
    expected = {f"{name}.{moment}" for name in parameters for moment in ("step", "exp_avg", "exp_avg_sq")}
    assert load_file(last(whole) / "optimizer.safetensors").keys() == expected


def test_the_end_of_a_training_lies_in_its_folder(whole: Path) -> None:
    for name in ("ilf.safetensors", "ilf.json"):
        assert (whole / name).read_bytes() == (last(whole) / name).read_bytes()


# --- where to go on


def test_auto_takes_the_last_and_begins_where_there_is_none(whole: Path, tmp_path: Path) -> None:
    assert checkpoints(whole).resume_point("auto") == last(whole)
    assert checkpoints(tmp_path).resume_point("auto") is None


def test_none_is_refused_where_a_training_lies(whole: Path, tmp_path: Path) -> None:
    assert checkpoints(tmp_path).resume_point("none") is None
    with pytest.raises(InvalidRequest, match=r"holds a training up to iteration 6; pass --resume auto"):
        checkpoints(whole).resume_point("none")


def test_a_folder_of_another_training_can_be_gone_on_from(tmp_path: Path, whole: Path) -> None:
    run_training(tmp_path / "first", stop_after=4)
    run_training(tmp_path / "second", resume=str(tmp_path / "first" / "steps" / "00000004"))
    assert equal(load_file(tmp_path / "second" / "ilf.safetensors"), load_file(whole / "ilf.safetensors"))


def test_a_folder_without_a_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no state\.json in it; give auto, none or a folder under steps/"):
        checkpoints(tmp_path).resume_point(str(tmp_path))


def test_going_back_over_later_checkpoints_is_refused(tmp_path: Path) -> None:
    for iteration in (1, 2):
        save(tmp_path, iteration)
    with pytest.raises(InvalidRequest, match="holds later checkpoints, up to iteration 2"):
        checkpoints(tmp_path).resume_point(str(tmp_path / "steps" / "00000001"))


def test_weights_moments_and_state_come_back_to_the_bit(whole: Path) -> None:
    model = small_model()
    optimizer = new_optimizer(model, small_recipe())
    state, _ = checkpoints(whole).load(last(whole), model, optimizer, served_model=model)
    assert state.iteration == ITERATIONS
    assert equal(feedback_of(model), load_file(last(whole) / "ilf.safetensors"))
    stored = load_file(last(whole) / "optimizer.safetensors")
    for name, parameter in model.feedback.named_parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], stored[f"{name}.exp_avg_sq"])
        assert optimizer.state[parameter]["step"] == ITERATIONS
    rates = [group["full_lr"] for group in optimizer.param_groups]
    assert rates == [1e-3, 2e-2]


# --- what does not fit

Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(path: Path, name: str) -> None:
    change_tensors(path, lambda tensors: tensors.pop(name))


def not_finite(path: Path, name: str) -> None:
    change_tensors(path, lambda tensors: tensors[name].fill_(float("nan")))


def change(path: Path, name: str, value: object) -> None:
    change_json(path, lambda data: data.update({name: value}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: cut(p / "state.json"), r"state\.json is damaged: it is not readable JSON"),
        (lambda p: cut(p / "ilf.safetensors"), r"ilf\.safetensors is damaged or cut short"),
        (lambda p: cut(p / "optimizer.safetensors"), r"optimizer\.safetensors is damaged.*remove 00000006 to resume"),
        (lambda p: (p / "state.json").unlink(), r"state\.json is damaged: it cannot be read"),
        (lambda p: (p / "ilf.safetensors").unlink(), r"ilf\.safetensors is missing"),
        (lambda p: (p / "optimizer.safetensors").unlink(), r"optimizer\.safetensors is missing"),
        (
            lambda p: without(p / "optimizer.safetensors", "scales.exp_avg"),
            r"optimizer\.safetensors: scales\.exp_avg is missing",
        ),
        (
            lambda p: not_finite(p / "optimizer.safetensors", "scales.exp_avg"),
            r"optimizer\.safetensors holds NaN or infinity in scales",
        ),
        (lambda p: not_finite(p / "ilf.safetensors", "scales"), "NaN or infinity in scales"),
        (lambda p: change(p / "state.json", "schema", 9), "schema 9, this version reads 1 and 2"),
        (lambda p: change(p / "state.json", "standing", {"odd": 1}), r"has an unknown field .*remove 00000006"),
        (lambda p: change(p / "state.json", "standing", 3), r"state\.json is damaged"),
        (lambda p: change(p / "state.json", "recipe", {}), r"state\.json is damaged .*seed is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused(copy: Path, damage: Damage, message: str) -> None:
    damage(last(copy))
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_without_the_damaged_one_the_one_before_is_gone_on_from(copy: Path, whole: Path) -> None:
    run_training(copy.parent / "two", small_recipe(checkpoint={"keep": 2}))
    cut(last(copy.parent / "two") / "optimizer.safetensors")
    shutil.rmtree(last(copy.parent / "two"))
    run_training(copy.parent / "two")
    assert_same_training(copy.parent / "two", whole)


def test_a_checkpoint_of_another_recipe_is_refused_by_field(copy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another recipe: optimisation\.lr is 0\.001 there and 0\.5 here"):
        run_training(copy, small_recipe(optimisation={"lr": 0.5}))


def test_a_checkpoint_of_another_base_is_refused(copy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trained on another base: its weights hash to 000000000000…"):
        load(copy, base=Base("elsewhere", "1" * 64))


def test_an_ilf_checkpoint_of_something_else_has_no_state(copy: Path) -> None:
    (last(copy) / "state.json").unlink()
    with pytest.raises(InvalidRequest, match=r"no state\.json"):
        run_training(copy.parent / "new", resume=str(last(copy)))
