"""The cost of a training: the paper's parameters and FLOP, and what each option adds or saves."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ilf_trt.contract.spec import Loop
from ilf_trt.errors import InvalidRequest, UnsupportedBackbone
from ilf_trt.train.cost import Cost, cost_of, cost_of_recipe
from ilf_trt.train.recipe import LossKind, Recipe
from tests.conftest import CLASSES, LOOP, small_dit
from tests.small_training import run_training, small_recipe

# The paper's counts; of the four PixArts alpha 1024 alone embeds the picture's size, which is 0.4 M.
MILLIONS = [
    ("pixart-alpha-1024", 611.3, 21.3),
    ("pixart-alpha-512", 610.9, 21.3),
    ("pixart-sigma-1024", 610.9, 21.3),
    ("pixart-sigma-512", 610.9, 21.3),
    ("dit-xl-256", 749.8, 26.7),
]
# The table of the paper's digest: FLOP of a block's forward at a guided batch of one picture, in 10^12.
BLOCK_TFLOP = {"pixart-alpha-1024": 0.471, "pixart-alpha-512": 0.092, "dit-xl-256": 0.017}
# The table leaves out what a block computes beside its matrices, and is rounded to two or three digits.
TABLE = 0.06
DIT = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 1,
    "out_channels": 2,
    "num_layers": 4,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": CLASSES,
}


@cache
def plain_cost() -> Cost:
    return cost_of(small_recipe(), "dit", DIT)


def cost(world: int = 1, **sections: Any) -> Cost:
    return cost_of(small_recipe(**sections), "dit", DIT, world=world) if sections or world > 1 else plain_cost()


def teacher_flop(name: str, blocks: int) -> float:
    """The arithmetic of one teacher's forward of every row, on a model of so many blocks."""
    recipe = Recipe.read(name)
    recipe = replace(recipe, model=replace(recipe.model, loop=Loop(0, 0)))
    costs = [
        cost_of(
            replace(recipe, loss=replace(recipe.loss, kind=kind)),
            str(recipe.model.kind),
            {**recipe.model.config, "num_layers": blocks},
        )
        for kind in (LossKind.FAST, LossKind.NONE)
    ]
    return costs[0].step_flop - costs[1].step_flop


@pytest.mark.parametrize(("name", "frozen", "trained"), MILLIONS)
def test_parameters_are_those_of_the_released_model(name: str, frozen: float, trained: float) -> None:
    recipe = Recipe.read(name, ["loss.kind=none"])  # the teacher has no parameters of its own
    counted = cost_of_recipe(recipe, 1)
    assert counted.frozen_parameters / 1e6 == pytest.approx(frozen, abs=0.05)
    assert counted.trained_parameters / 1e6 == pytest.approx(trained, abs=0.05)


@pytest.mark.parametrize("name", BLOCK_TFLOP)
def test_a_block_s_forward_has_the_table_s_flop(name: str) -> None:
    # The teacher is one plain forward more of every row; a guided picture is two rows.
    block = teacher_flop(name, 2) - teacher_flop(name, 1)
    rows = Recipe.read(name).optimisation.batch_size
    assert 2 * block / rows / 1e12 == pytest.approx(BLOCK_TFLOP[name], rel=TABLE)


def test_the_count_is_that_of_the_model_itself() -> None:
    backbone = small_dit()
    small = cost()
    assert small.frozen_parameters == sum(parameter.numel() for parameter in backbone.parameters())
    block = sum(parameter.numel() for parameter in backbone.transformer_blocks[LOOP[1]].parameters())
    assert small.trained_parameters == block + 2


def test_a_checkpoint_on_disk_has_the_counted_size(tmp_path: Path) -> None:
    for ema in (0.0, 2.0):
        folder = tmp_path / str(ema)
        run_training(folder, small_recipe(optimisation={"iterations": 1, "ema": ema}))
        size = sum(path.stat().st_size for path in (folder / "steps" / "00000001").iterdir())
        assert size == pytest.approx(cost(optimisation={"ema": ema}).checkpoint_bytes, rel=0.05)  # names and JSON


def test_more_rows_at_once_need_more_memory_and_no_more_flop() -> None:
    one, parts, processes = cost(), cost(optimisation={"accumulate": 4}), cost(world=4)
    assert (one.rows_at_once, parts.rows_at_once, processes.rows_at_once) == (8, 2, 2)
    assert one.activations_bytes == 4 * parts.activations_bytes == 4 * processes.activations_bytes
    assert one.step_flop == parts.step_flop == processes.step_flop


def test_gradient_checkpointing_saves_memory_and_costs_flop() -> None:
    plain, saving = cost(), cost(compute={"gradient_checkpointing": True})
    assert saving.activations_bytes < 0.5 * plain.activations_bytes
    assert plain.step_flop < saving.step_flop < 1.5 * plain.step_flop


def test_half_precision_halves_the_frozen_bytes_alone() -> None:
    whole, half = cost(), cost(compute={"precision": "bf16"})
    assert half.frozen_bytes * 2 == whole.frozen_bytes
    assert (half.trained_bytes, half.optimizer_bytes) == (whole.trained_bytes, whole.optimizer_bytes)


def test_what_trains_costs_the_same_on_a_deeper_backbone() -> None:
    deeper = cost_of(small_recipe(), "dit", {**DIT, "num_layers": 8})
    assert (deeper.trained_bytes, deeper.optimizer_bytes) == (cost().trained_bytes, cost().optimizer_bytes)
    assert deeper.frozen_bytes > 1.5 * cost().frozen_bytes


def test_a_teacher_costs_its_forwards() -> None:
    none, fast = cost(loss={"kind": "none"}), cost()
    two, eight = (cost(loss={"kind": "standard", "teacher_steps": steps}) for steps in (2, 8))
    forward = fast.step_flop - none.step_flop
    assert forward > 0
    assert eight.step_flop - two.step_flop == pytest.approx(6 * forward)


def test_hours_are_all_flop_over_the_rate() -> None:
    small = cost()
    assert small.total_flop == small.step_flop * small.iterations
    assert small.hours(2.0) == pytest.approx(small.total_flop / 2e12 / 3600)


def test_a_loop_that_does_not_fit_is_refused() -> None:
    recipe = small_recipe()
    with pytest.raises(InvalidRequest, match="loop"):
        cost_of(replace(recipe, model=replace(recipe.model, loop=Loop(2, 9))), "dit", DIT)


def test_a_kind_without_an_adapter_is_refused() -> None:
    with pytest.raises(UnsupportedBackbone, match="no adapter for backbone kind 'unet'"):
        cost_of(small_recipe(), "unet", {})


def test_cifar_10_is_counted_without_its_weights() -> None:
    assert cost_of_recipe(Recipe.read("cifar10", ["loss.kind=none"]), 1).frozen_parameters / 1e6 == pytest.approx(
        35.2, abs=0.05
    )
