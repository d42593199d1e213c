"""The log of a training and its sample grids: whole lines up to where it stands, and the same pictures every time."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ilf_trt import ILFModel, attach
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.errors import InvalidRequest
from ilf_trt.train.log import Sampler, TrainingLog
from ilf_trt.train.recipe import Logging
from tests.conftest import LOOP, small_dit, small_pixart


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def pixels(path: Path) -> Any:
    with Image.open(path) as picture:
        return np.asarray(picture)


def write(folder: Path, iterations: range, start: int = 0) -> None:
    with TrainingLog(folder, start) as log:
        for iteration in iterations:
            log.write(iteration, {"loss": iteration / 10, "scales": [0.1, 0.2]})


def wait_for_the_next_second() -> None:
    """TensorBoard reads its files in the order of the seconds in their names; those of one second it may swap."""
    time.sleep(1.01 - time.time() % 1)


def events(folder: Path) -> dict[str, list[int]]:
    """Tags in TensorBoard, each with its steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {tag: [event.step for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_a_line_is_one_json_object_with_its_iteration(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    assert lines(tmp_path) == [{"iteration": i, "loss": i / 10, "scales": [0.1, 0.2]} for i in (1, 2)]


def test_a_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, 0) as log:
        log.write(1, {"loss": 1.0})
        assert len(lines(tmp_path)) == 1


def test_tensorboard_gets_numbers_and_each_of_a_list(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    assert events(tmp_path) == {"loss": [1, 2, 3], "scales/0": [1, 2, 3], "scales/1": [1, 2, 3]}


def test_lines_after_the_iteration_are_dropped_in_both(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    wait_for_the_next_second()
    write(tmp_path, range(4, 5), start=3)
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert events(tmp_path)["loss"] == [1, 2, 3, 4]


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"iteration": 3, "lo')
    write(tmp_path, range(3, 4), start=3)
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_process_that_dies_while_it_drops_lines_leaves_the_old_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, range(1, 6))

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        TrainingLog(tmp_path, 3)
    assert len(lines(tmp_path)) == 5


@pytest.mark.parametrize("content", ["of something else\n", "3\n", "{}\n", '{"loss": 1}\n'])
def test_a_log_of_something_else_is_refused_and_left(tmp_path: Path, content: str) -> None:
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(InvalidRequest, match=r"log\.jsonl is no log of a training.*another --output"):
        TrainingLog(tmp_path, 0)
    assert (tmp_path / "log.jsonl").read_text() == content


def test_without_tensorboard_the_json_lines_are_written_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("ilf_trt.train.log.import_module", missing)
    write(tmp_path, range(1, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


# --- sample grids


@pytest.fixture(scope="module")
def model() -> ILFModel:
    model = attach(small_dit(), LOOP)
    torch.nn.init.constant_(model.feedback.scales, 0.1)
    return model


def sampler(folder: Path, labels: list[int], guidance_scale: float = 1.0) -> Sampler:
    return Sampler(folder, Logging(steps=2, guidance_scale=guidance_scale), DEFAULT_SCHEDULER, labels)


def test_a_grid_is_as_square_as_it_goes_and_enlarged(tmp_path: Path, model: ILFModel) -> None:
    path = sampler(tmp_path, [0, 1, 2, 3, 4]).write(model, 7, None)
    assert path == tmp_path / "samples" / "00000007.png"
    assert pixels(path).shape == (2 * 64, 3 * 64)


def test_the_same_model_gives_the_same_grid_and_another_another(tmp_path: Path, model: ILFModel) -> None:
    grids = sampler(tmp_path, [0, 1])
    first, second = (pixels(grids.write(model, i, None)) for i in (1, 2))
    other = attach(small_dit(), LOOP)
    torch.nn.init.constant_(other.feedback.scales, 1.0)
    third = pixels(grids.write(other, 3, None))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)


def test_sampling_does_not_move_torch_s_own_generator(tmp_path: Path, model: ILFModel) -> None:
    before = torch.get_rng_state()
    sampler(tmp_path, [0]).write(model, 1, None)
    assert torch.equal(before, torch.get_rng_state())


def test_guidance_changes_the_grid(tmp_path: Path, model: ILFModel) -> None:
    grids = [sampler(tmp_path / str(scale), [1, 2], scale).write(model, 1, None) for scale in (1.0, 4.0)]
    assert not np.array_equal(*map(pixels, grids))


def test_a_grid_in_bfloat16_is_written_too(tmp_path: Path, model: ILFModel) -> None:
    assert sampler(tmp_path, [0]).write(model, 1, torch.bfloat16).is_file()


def test_models_of_classes_in_pixels_are_served_alone(model: ILFModel) -> None:
    assert Sampler.serves(model)
    assert not Sampler.serves(attach(small_dit(in_channels=4), LOOP))
    assert not Sampler.serves(attach(small_pixart(sized=True), LOOP))
