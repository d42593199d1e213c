"""The recipe: the files in the package, the paper's settings, what may be set, and what a near miss is told."""

import json
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from ilf_trt.contract.spec import Initialisation, Loop
from ilf_trt.errors import InvalidRequest
from ilf_trt.train.recipe import LossKind, Metric, Recipe, SecondPass, TrainPrecision, recipe_names
from tests.small_training import small_recipe

TEXT_MODELS = ("pixart-alpha-1024", "pixart-alpha-512", "pixart-sigma-1024", "pixart-sigma-512")
PAIRS, TEXT_EPOCHS = 2_000_000, 5
IMAGENET, CLASS_EPOCHS = 1_281_167, 10


def refused(changes: list[str], message: str, name: str = "demo") -> None:
    with pytest.raises(InvalidRequest, match=message):
        Recipe.read(name, changes)


# --- the files


def test_the_package_holds_the_demos_cifar_10_and_the_paper_s_five_models() -> None:
    assert recipe_names() == sorted(["cifar10", "demo", "dit-xl-256", "emoji", *TEXT_MODELS])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_read_and_comes_back_from_json(name: str) -> None:
    recipe = Recipe.read(name)
    assert Recipe.from_table(json.loads(json.dumps(recipe.as_json()))) == recipe


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_to_image_has_the_paper_s_settings(name: str) -> None:
    optimisation = Recipe.read(name).optimisation
    assert (optimisation.lr, optimisation.scale_lr, optimisation.batch_size) == (1e-6, 1e-6, 2048)
    assert optimisation.iterations == ceil(TEXT_EPOCHS * PAIRS / 2048)


def test_class_to_image_has_the_paper_s_settings() -> None:
    optimisation = Recipe.read("dit-xl-256").optimisation
    assert (optimisation.lr, optimisation.scale_lr, optimisation.batch_size) == (5e-6, 5e-6, 8192)
    assert optimisation.iterations == ceil(CLASS_EPOCHS * IMAGENET / 8192)


@pytest.mark.parametrize("name", [*TEXT_MODELS, "dit-xl-256"])
def test_the_paper_s_recipes_distil_fast_over_its_middle_loop_from_a_copied_block(name: str) -> None:
    recipe = Recipe.read(name)
    assert (recipe.model.loop, recipe.model.initialisation) == (Loop(8, 19), Initialisation.END)
    assert (recipe.loss.kind, recipe.loss.reconstruction, recipe.loss.distillation) == (LossKind.FAST, 1.0, 1.0)
    assert recipe.optimisation.ema == 0


@pytest.mark.parametrize(
    ("name", "sample_size", "text_tokens", "sized", "scale"),
    [
        ("pixart-alpha-1024", 128, 120, True, 2),
        ("pixart-alpha-512", 64, 120, False, None),
        ("pixart-sigma-1024", 128, 300, False, 2),
        ("pixart-sigma-512", 64, 300, False, None),
    ],
)
def test_a_pixart_s_size_and_text_are_those_of_its_release(
    name: str, sample_size: int, text_tokens: int, sized: bool, scale: int | None
) -> None:
    model = Recipe.read(name).model
    assert (model.config["sample_size"], model.text_tokens) == (sample_size, text_tokens)
    assert (model.config["use_additional_conditions"], model.config.get("interpolation_scale")) == (sized, scale)


# --- changes


def test_fields_are_set_by_section_and_key() -> None:
    recipe = Recipe.read(
        "demo",
        [
            "seed=7",
            "optimisation.lr=1e-5",
            "loss.kind=standard",
            'loss.second_pass="t/2"',
            "compute.precision=bf16",
            "compute.compile=true",
            "checkpoint.metric=validation",
            "model.loop=2:5",
            "model.initialisation=zero",
            "data.path=/some/where",
        ],
    )
    assert (recipe.seed, recipe.optimisation.lr, recipe.loss.kind) == (7, 1e-5, LossKind.STANDARD)
    assert (recipe.loss.second_pass, recipe.compute.precision) == (SecondPass.HALF, TrainPrecision.BF16)
    assert (recipe.compute.compile, recipe.checkpoint.metric) == (True, Metric.VALIDATION)
    assert (recipe.model.loop, recipe.model.initialisation) == (Loop(2, 5), Initialisation.ZERO)
    assert recipe.data == {"kind": "digits", "path": "/some/where"}


def test_a_list_is_a_loop_too_and_a_whole_number_a_float() -> None:
    recipe = Recipe.read("demo", ["model.loop=[2, 5]", "optimisation.clip=1"])
    assert (recipe.model.loop, recipe.optimisation.clip) == (Loop(2, 5), 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimisation.learning_rate=1", r"optimisation\.learning_rate is unknown.*it takes iterations"),
        ("optimisation.batchsize=1", r"optimisation\.batchsize is unknown; did you mean batch_size\?"),
        ("optimization.lr=1", r"optimization is unknown; did you mean optimisation\?"),
        (
            "loss.kind=fsat",
            r"loss\.kind is 'fsat', it must be one of fast, standard, interval, none; did you mean fast\?",
        ),
        ("model.initialisation=ends", r"must be one of end, begin, zero; did you mean end\?"),
        ("loss.second_pass=t/3", r"loss\.second_pass is 't/3'"),
        ("optimisation.lr=fast", r"optimisation\.lr is 'fast', it must be a finite number"),
        ("optimisation.lr=nan", r"optimisation\.lr is 'nan', it must be a finite number"),
        ("optimisation.iterations=1.5", r"optimisation\.iterations is 1\.5, it must be a whole number"),
        ("optimisation.iterations=true", r"optimisation\.iterations is True, it must be a whole number"),
        ("compute.compile=1", r"compute\.compile is 1, it must be true or false"),
        ("model.base=1", r"model\.base is 1, it must be text"),
        ("data=digits", r"data is 'digits', it must be a table"),
        ("optimisation=3", r"optimisation is 3, it must be a table"),
        ("model.loop=8-19", r"8-19"),
        ("optimisation.iterations=0", r"optimisation\.iterations is 0, it must be at least 1"),
        ("optimisation.lr=-1", r"optimisation\.lr is -1"),
        ("optimisation.ema=-1", r"optimisation\.ema is -1"),
        ("optimisation.warm_up=-1", r"optimisation\.warm_up is -1"),
        ("loss.teacher_steps=1", r"loss\.teacher_steps is 1, it must be at least 2"),
        ("loss.condition_dropout=1.1", r"loss\.condition_dropout is 1\.1, it must be from 0 to 1"),
        ("loss.kind=interval", r"loss\.kind is interval and loss\.second_pass is t; interval needs t-i\*m/n"),
        ("loss.second_pass=t-i*m/n", r"loss\.kind is fast and loss\.second_pass is t-i\*m/n"),
        ("loss.fewest_steps=13", r"loss\.most_steps is 12, it must be at least 13"),
        ("loss.fewest_steps=0", r"loss\.fewest_steps is 0"),
        ("loss.look_ahead=-1", r"loss\.look_ahead is -1"),
        ("checkpoint.every=0", r"checkpoint\.every is 0"),
        ("checkpoint.keep=0", r"checkpoint\.keep is 0"),
        ("logging.every=0", r"logging\.every is 0"),
        ("seed=-1", r"seed is -1"),
        ("optimisation.lr", r"is not SECTION\.KEY=VALUE"),
        ("seed.deep=1", r"seed is no section"),
    ],
)
def test_a_change_that_cannot_be_is_refused(change: str, message: str) -> None:
    refused([change], message)


def test_a_refusal_names_the_recipe() -> None:
    refused(["seed=-1"], "recipe demo: ")


def test_a_loss_without_a_term_is_refused() -> None:
    refused(["loss.kind=none", "loss.reconstruction=0"], "every term of the loss has weight 0")
    refused(["loss.distillation=0", "loss.reconstruction=0"], "every term of the loss has weight 0")


def test_a_near_miss_of_a_name_is_told() -> None:
    refused([], r"recipe 'cifar' is neither a file nor one of cifar10, demo.*did you mean cifar10\?", "cifar")


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 0\n[model\n")
    refused([], r"mine\.toml is not readable TOML: .*line 2", str(path))
    path.write_bytes(b"\xff\xfe")
    refused([], "is not UTF-8 text", str(path))


def test_a_missing_field_is_named_with_the_way_to_set_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('seed = 0\n[model]\nbase = "demo"\n')
    refused([], r"model\.loop is missing; set it in the recipe or with --set model\.loop=", str(path))


# --- what follows from it


def test_rates_rise_over_the_warm_up_and_stay() -> None:
    warm = small_recipe(optimisation={"warm_up": 4}).optimisation
    assert [warm.lr_factor(iteration) for iteration in (1, 2, 4, 5)] == [0.25, 0.5, 1.0, 1.0]
    assert small_recipe().optimisation.lr_factor(1) == 1.0


def test_rows_at_once_are_the_batch_over_processes_and_parts() -> None:
    optimisation = small_recipe(optimisation={"batch_size": 24, "accumulate": 3}).optimisation
    assert optimisation.rows_at_once(2) == 4
    with pytest.raises(InvalidRequest, match=r"must divide by 5 .*accumulate 3; take 15"):
        optimisation.rows_at_once(5)
    with pytest.raises(InvalidRequest, match="take 48"):
        optimisation.rows_at_once(16)


@pytest.mark.parametrize(
    "change",
    [
        {"optimisation": {"iterations": 99, "accumulate": 4}},
        {"compute": {"precision": "bf16"}},
        {"checkpoint": {"every": 1}},
        {"logging": {"every": 9}},
        {"model": {"base": "moved"}},
        {"data": {"path": "moved", "workers": 3}},
    ],
    ids=str,
)
def test_a_training_may_go_on_with_another(change: dict[str, Any]) -> None:
    assert small_recipe().differences(small_recipe(**change)) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"optimisation": {"lr": 0.5}}, "optimisation.lr"),
        ({"optimisation": {"batch_size": 16}}, "optimisation.batch_size"),
        ({"optimisation": {"ema": 5.0}}, "optimisation.ema"),
        ({"loss": {"kind": "none"}}, "loss.kind"),
        ({"model": {"loop": "1:1"}}, "model.loop"),
        ({"model": {"initialisation": "begin"}}, "model.initialisation"),
        ({"data": {"kind": "other"}}, "data.kind"),
    ],
    ids=str,
)
def test_a_training_may_not_go_on_with_another(change: dict[str, Any], name: str) -> None:
    ((field, mine, theirs),) = small_recipe().differences(small_recipe(**change))
    assert field == name
    assert mine != theirs
