"""The state of a training: whole or not there, the last few and the best, and refusals of what does not fit."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ilf_trt.errors import CheckpointError, InvalidRequest
from ilf_trt.train.checkpoints import Base, Standing, States, remove, written_whole
from ilf_trt.train.loop import new_optimizer
from tests.small_training import BASE, assert_same_training, equal, feedback_of, run_training, small_model, small_recipe

ITERATIONS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_training(folder)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A training to damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))


def last(folder: Path) -> Path:
    return folder / "steps" / f"{ITERATIONS:08d}"


def states(folder: Path, keep: int = 2, base: Base = BASE) -> States:
    return States(folder, small_recipe(checkpoint={"keep": keep}), base)


def save(folder: Path, iteration: int, keep: int = 2, best: int = 0) -> None:
    model = small_model()
    standing = Standing(iteration=iteration, best=0.5 if best else None, best_iteration=best)
    states(folder, keep).save(standing, model, new_optimizer(model, small_recipe()), {}, served=model)


def load(folder: Path, path: Path | None = None, base: Base = BASE) -> Standing:
    model = small_model()
    optimizer = new_optimizer(model, small_recipe())
    standing, _ = states(folder, base=base).load(path or last(folder), model, optimizer, served=model)
    return standing


def names(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "steps").iterdir())


# --- whole or not there


def test_a_folder_takes_its_name_once_it_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    with written_whole(place) as draft:
        (draft / "file").write_text("x")
        assert not place.exists()
    assert (place / "file").read_text() == "x"
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_what_fails_half_way_leaves_the_old_folder_and_no_draft(tmp_path: Path, error: type[BaseException]) -> None:
    place = tmp_path / "b"
    place.mkdir()
    (place / "file").write_text("old")

    def fails() -> None:
        with written_whole(place) as draft:
            (draft / "file").write_text("new")
            raise error

    with pytest.raises(error):
        fails()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert (place / "file").read_text() == "old"


def test_all_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(handle: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name.partition('.partial')[0]}")
        fsync(handle)

    def renamed(path: Path, target: Path) -> Path:
        done.append(f"rename {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    with written_whole(tmp_path / "place") as draft:
        (draft / "file").write_text("x")
    assert done == ["sync file", "sync .place", "rename place", f"sync {tmp_path.name}"]


def test_a_full_disk_is_a_readable_error(tmp_path: Path) -> None:
    message = r"place: No space left on device; make room there.*--resume auto"
    with pytest.raises(CheckpointError, match=message), written_whole(tmp_path / "place"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_readable_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoint"), written_whole(tmp_path / "file" / "place"):
        pass


def test_a_checkpoint_is_out_of_sight_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "00000001"
    place.mkdir()

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        remove(place)
    assert not place.exists()


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
    half = tmp_path / "steps" / ".00000002.partial-0a1b2c3d"
    half.mkdir()
    (half / "ilf.json").write_text("{")
    (tmp_path / ".best.partial-77").symlink_to("steps/00000001")
    (tmp_path / ".ilf.json.partial-77").write_text("{")
    assert states(tmp_path).chosen("auto") == tmp_path / "steps" / "00000001"
    states(tmp_path).tidy(Standing(iteration=1))
    assert [path.name for path in tmp_path.iterdir()] == ["steps"]
    assert names(tmp_path) == [1]
    assert (tmp_path / "steps" / "00000001" / "ilf.json").is_file()


def test_a_checkpoint_holds_the_feedback_and_its_moments_and_nothing_of_the_backbone(trained: Path) -> None:
    files = {path.name for path in last(trained).iterdir()}
    assert files == {"ilf.json", "ilf.safetensors", "optimizer.safetensors", "state.json"}
    parameters = dict(small_model().feedback.named_parameters())
    assert load_file(last(trained) / "ilf.safetensors").keys() == parameters.keys()
    wanted = {f"{name}.{moment}" for name in parameters for moment in ("step", "exp_avg", "exp_avg_sq")}
    assert load_file(last(trained) / "optimizer.safetensors").keys() == wanted


def test_the_end_of_a_training_lies_in_its_folder(trained: Path) -> None:
    for name in ("ilf.safetensors", "ilf.json"):
        assert (trained / name).read_bytes() == (last(trained) / name).read_bytes()


# --- where to go on


def test_auto_takes_the_last_and_begins_where_there_is_none(trained: Path, tmp_path: Path) -> None:
    assert states(trained).chosen("auto") == last(trained)
    assert states(tmp_path).chosen("auto") is None


def test_none_is_refused_where_a_training_lies(trained: Path, tmp_path: Path) -> None:
    assert states(tmp_path).chosen("none") is None
    with pytest.raises(InvalidRequest, match=r"holds a training up to iteration 6; pass --resume auto"):
        states(trained).chosen("none")


def test_a_folder_of_another_training_can_be_gone_on_from(tmp_path: Path, trained: Path) -> None:
    run_training(tmp_path / "first", stop_after=4)
    run_training(tmp_path / "second", resume=str(tmp_path / "first" / "steps" / "00000004"))
    assert equal(load_file(tmp_path / "second" / "ilf.safetensors"), load_file(trained / "ilf.safetensors"))


def test_a_folder_without_a_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no state\.json in it; give auto, none or a folder under steps/"):
        states(tmp_path).chosen(str(tmp_path))


def test_going_back_over_later_checkpoints_is_refused(tmp_path: Path) -> None:
    for iteration in (1, 2):
        save(tmp_path, iteration)
    with pytest.raises(InvalidRequest, match="holds later checkpoints, up to iteration 2"):
        states(tmp_path).chosen(str(tmp_path / "steps" / "00000001"))


def test_weights_moments_and_standing_come_back_to_the_bit(trained: Path) -> None:
    model = small_model()
    optimizer = new_optimizer(model, small_recipe())
    standing, _ = states(trained).load(last(trained), model, optimizer, served=model)
    assert standing.iteration == ITERATIONS
    assert equal(feedback_of(model), load_file(last(trained) / "ilf.safetensors"))
    stored = load_file(last(trained) / "optimizer.safetensors")
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
    save_file({key: value for key, value in load_file(path).items() if key != name}, path)


def not_finite(path: Path, name: str) -> None:
    tensors = load_file(path)
    tensors[name].fill_(float("nan"))
    save_file(tensors, path)


def change(path: Path, name: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: cut(p / "state.json"), r"state\.json is not readable JSON"),
        (lambda p: cut(p / "ilf.safetensors"), r"ilf\.safetensors is damaged or cut short"),
        (lambda p: cut(p / "optimizer.safetensors"), r"optimizer\.safetensors is damaged.*remove 00000006 to go on"),
        (lambda p: (p / "state.json").unlink(), r"state\.json is not readable"),
        (lambda p: (p / "ilf.safetensors").unlink(), r"ilf\.safetensors is missing"),
        (lambda p: (p / "optimizer.safetensors").unlink(), r"optimizer\.safetensors is damaged"),
        (lambda p: without(p / "optimizer.safetensors", "scales.exp_avg"), r"damaged .*scales\.exp_avg"),
        (
            lambda p: not_finite(p / "optimizer.safetensors", "scales.exp_avg"),
            "scales has another shape, or is not fin",
        ),
        (lambda p: not_finite(p / "ilf.safetensors", "scales"), "NaN or infinity in scales"),
        (lambda p: change(p / "state.json", "schema", 9), "schema 9, this version reads 1"),
        (lambda p: change(p / "state.json", "standing", {"odd": 1}), r"state\.json is damaged .*remove 00000006"),
        (lambda p: change(p / "state.json", "standing", 3), r"state\.json is damaged"),
        (lambda p: change(p / "state.json", "recipe", {}), r"state\.json is damaged .*seed is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused(copy: Path, damage: Damage, message: str) -> None:
    damage(last(copy))
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_without_the_damaged_one_the_one_before_is_gone_on_from(copy: Path, trained: Path) -> None:
    run_training(copy.parent / "two", small_recipe(checkpoint={"keep": 2}))
    cut(last(copy.parent / "two") / "optimizer.safetensors")
    shutil.rmtree(last(copy.parent / "two"))
    run_training(copy.parent / "two")
    assert_same_training(copy.parent / "two", trained)


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
