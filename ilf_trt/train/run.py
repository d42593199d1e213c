"""From a recipe to a training: opens its data and its base, checks that they fit, and runs the loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ilf_trt.contract.arrays import numbers_of
from ilf_trt.contract.progress import Progress
from ilf_trt.errors import InvalidRequest
from ilf_trt.model.base import base_scheduler, base_source, load_backbone
from ilf_trt.model.checkpoint import fingerprint
from ilf_trt.model.surgery import attach

from .checkpoints import Base
from .data import fit_stream, open_stream
from .loop import Outcome, RunSetup, train
from .recipe import Recipe


def train_recipe(
    recipe: Recipe, output: Path, *, resume: str, cpu: bool, stop: Callable[[], bool], progress: Progress
) -> Outcome:
    """Train the feedback block of a recipe into `output`; see `loop.train` and `loop.RunSetup` for the arguments.

    Raises InvalidRequest, DataError, CheckpointError, UnsupportedBackbone.
    """
    stream = open_stream(recipe.data, global_batch=recipe.optimisation.batch_size, seed=recipe.seed)
    validation = None
    if recipe.validation:
        validation = open_stream(
            recipe.validation, global_batch=recipe.optimisation.batch_size, seed=recipe.seed, section="validation"
        )
    source = base_source(recipe.model.base)  # the base last: it takes longest to load
    backbone = load_backbone(recipe.model.base)
    _check_config(recipe, backbone)
    model = attach(backbone, recipe.model.loop, initialisation=recipe.model.initialisation)
    labels: tuple[int, ...] = ()
    classes = model.adapter.conditioning(1).classes
    if recipe.logging.samples_every and classes is not None:
        labels = labels_of(recipe.logging.labels, classes)
    setup = RunSetup(
        output, Base(source, fingerprint(backbone)), base_scheduler(source), resume=resume, cpu=cpu, labels=labels
    )
    return train(
        model,
        recipe,
        fit_stream(stream, model.adapter),
        setup,
        validation=fit_stream(validation, model.adapter) if validation else None,
        progress=progress,
        stop=stop,
    )


def labels_of(text: str, classes: int) -> tuple[int, ...]:
    """`"0-9,207"` -> the numbers. Raises InvalidRequest for a number that is no class of the model."""
    try:
        labels = numbers_of(text, "labels")
    except InvalidRequest as error:
        raise InvalidRequest(f"logging.labels is {text!r}; give numbers and ranges, such as 0-9,207") from error
    if not 0 <= min(labels) <= max(labels) < classes:
        raise InvalidRequest(f"logging.labels is {text!r}; this base has the classes 0 to {classes - 1}")
    return tuple(labels)


def _check_config(recipe: Recipe, backbone: Any) -> None:
    for name, value in recipe.model.config.items():
        base_value = backbone.config.get(name, value)
        if base_value != value:
            raise InvalidRequest(
                f"model.config.{name} is {value!r}, the base {recipe.model.base} has {base_value!r}; correct the "
                "recipe, or set model.base to another base"
            )
