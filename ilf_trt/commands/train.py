"""The command `train`: a recipe to an ILF checkpoint, or with --dry-run to what that will cost."""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ilf_trt.contract.arrays import numbers_of
from ilf_trt.errors import InvalidRequest, MissingDependency
from ilf_trt.train.recipe import Recipe

if TYPE_CHECKING:
    from ilf_trt.train.batch_stream import Feed

GIB, MIB, TERA = 1 << 30, 1 << 20, 1e12
ENDED_BY = {signal.SIGTERM: 143, signal.SIGINT: 130}
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic


def train(
    *,
    config: str,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    resume: str = "auto",
    cpu: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    processes: int = 1,
    rate: float = 400.0,
) -> None:
    """Train the feedback block of a recipe; on several devices by `accelerate launch -m ilf_trt train …`.

    Example: `ilf-trt train --config demo --output build/demo-training`

    Parameters
    ----------
    config
        A recipe: a TOML file, or the name of one in the package.
    output
        Folder for checkpoints, log and samples, and in the end the ILF checkpoint that `ilf-trt build` takes.
    set_
        Change a field of the recipe, SECTION.KEY=VALUE; may be repeated.
    resume
        auto goes on from the last checkpoint in the output folder, if any; none; or the folder of a checkpoint.
    cpu
        Leave the GPU alone.
    dry_run
        Print memory, arithmetic, steps and hours, and train nothing; no weight is needed.
    processes
        Processes that a dry run reckons with.
    rate
        TFLOP/s over all devices that a dry run reckons with.
    """
    recipe = Recipe.read(config, set_)
    if dry_run:
        if processes < 1 or not rate > 0:
            raise InvalidRequest(f"processes is {processes} and rate {rate}; both must be above 0")
        _print_cost(recipe, processes, rate)
        return
    if output is None:
        raise InvalidRequest("--output is missing; give the folder of the training, or --dry-run")
    os.environ.setdefault(*CUBLAS_WORKSPACE)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with _asked_to_stop() as asked:
        outcome = _train(recipe, output, resume=resume, cpu=cpu, stop=lambda: bool(asked))
    if not outcome.main:
        sys.exit(ENDED_BY[asked[0]] if asked else 0)
    if outcome.stopped:
        Console(stderr=True, soft_wrap=True).print(
            f"stopped at iteration {outcome.iteration}, saved; the same command with --resume auto goes on",
            highlight=False,
        )
        sys.exit(ENDED_BY[asked[0]] if asked else ENDED_BY[signal.SIGTERM])
    Console(soft_wrap=True).print(
        f"wrote {output}, mean loss {outcome.mean_loss:.4f}\nnext: ilf-trt build --checkpoint {output} -o {output}.ilf",
        highlight=False,
    )


def _train(recipe: Recipe, output: Path, *, resume: str, cpu: bool, stop: Callable[[], bool]) -> Any:
    try:
        from ilf_trt.model.checkpoint import base_scheduler, base_source, fingerprint, load_backbone
        from ilf_trt.model.surgery import attach
        from ilf_trt.train import loop as training
        from ilf_trt.train.checkpoints import Base
        from ilf_trt.train.data import fitted
    except ImportError as error:
        raise MissingDependency(f"training needs {error.name}; pip install 'ilf-trt[train]'") from error
    feed = _feed(recipe, recipe.data, "data")  # the quick refusals first
    validation = _feed(recipe, recipe.validation, "validation") if recipe.validation else None
    source = base_source(recipe.model.base)
    backbone = load_backbone(recipe.model.base)
    _check_config(recipe, backbone)
    model = attach(backbone, recipe.model.loop, initialisation=recipe.model.initialisation)
    labels: tuple[int, ...] = ()
    if recipe.logging.samples_every and model.adapter.kind == "dit":
        labels = labels_of(recipe.logging.labels, int(backbone.config.num_embeds_ada_norm))
    setting = training.Setting(
        output,
        Base(source, fingerprint(backbone)),
        base_scheduler(source),
        resume=resume,
        cpu=cpu,
        labels=labels,
    )
    with _bar(recipe.optimisation.iterations) as progress:
        return training.train(
            model,
            recipe,
            fitted(feed, model.adapter),
            setting,
            validation=fitted(validation, model.adapter) if validation else None,
            progress=progress,
            stop=stop,
        )


def labels_of(text: str, classes: int) -> tuple[int, ...]:
    """`"0-9,207"` -> the numbers; raises InvalidRequest for what is no class of the model."""
    try:
        labels = numbers_of(text, "labels")
    except InvalidRequest as error:
        raise InvalidRequest(f"logging.labels is {text!r}; give numbers and ranges, such as 0-9,207") from error
    if max(labels) >= classes:
        raise InvalidRequest(f"logging.labels is {text!r}; this base has the classes 0 to {classes - 1}")
    return tuple(labels)


def _feed(recipe: Recipe, table: Mapping[str, Any], section: str) -> "Feed":
    from ilf_trt.train.data import open_feed

    return open_feed(table, global_batch=recipe.optimisation.batch_size, seed=recipe.seed, section=section)


def _check_config(recipe: Recipe, backbone: Any) -> None:
    for name, value in recipe.model.config.items():
        found = backbone.config.get(name, value)
        if found != value:
            raise InvalidRequest(
                f"model.config.{name} is {value!r}, the base {recipe.model.base} has {found!r}; mend the recipe, or "
                "set model.base to the right one"
            )


def _print_cost(recipe: Recipe, processes: int, rate: float) -> None:
    try:
        from ilf_trt.model.checkpoint import base_source
        from ilf_trt.train.cost import cost_of
    except ImportError as error:
        raise MissingDependency(f"a dry run needs {error.name}; pip install 'ilf-trt[train]'") from error
    kind, config = recipe.model.kind, recipe.model.config
    if kind is None or not config:
        kind, config = _described(Path(base_source(recipe.model.base)), recipe)
    cost = cost_of(recipe, kind, config, world=processes)
    optimisation = recipe.optimisation
    memory = {
        "frozen": cost.frozen_bytes,
        "F and s, gradients": cost.trained_bytes,
        "optimizer": cost.optimizer_bytes,
        f"activations of {cost.rows_at_once} rows (estimate)": cost.activations_bytes,
    }
    facts = {
        "parameters": f"{cost.frozen_parameters / 1e6:.1f} M frozen, {cost.trained_parameters / 1e6:.1f} M trained",
        **{f"memory: {name}": _size(size_bytes) for name, size_bytes in memory.items()},
        "memory of a process (estimate)": _size(sum(memory.values())),
        "a checkpoint on disk": _size(cost.checkpoint_bytes),
        "batch": f"{optimisation.batch_size} = {processes} x {optimisation.accumulate} x {cost.rows_at_once}",
        "TFLOP a step": f"{cost.step_flop / TERA:.4g}",
        "steps": str(cost.iterations),
        "TFLOP in all": f"{cost.total_flop / TERA:.4g}",
        f"hours at {rate:g} TFLOP/s": f"{cost.hours(rate):.3g}",
    }
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, value)
    Console(width=max(80, Console().width)).print(table)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.3g} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.3g} MiB"


def _described(folder: Path, recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Kind and config of a base that lies on the disk."""
    from ilf_trt.model.backbones import adapter_of_class

    for path in (folder / "config.json", folder / "transformer" / "config.json"):
        if path.is_file():
            config = json.loads(path.read_text())
            return adapter_of_class(str(config.get("_class_name"))).kind, config
    raise InvalidRequest(
        f"base {recipe.model.base} is not on this disk; for a dry run give model.kind and [model.config] in the recipe"
    )


@contextmanager
def _asked_to_stop() -> Iterator[list[signal.Signals]]:
    """The signals that asked for an end; the second of them ends at once, as without this."""
    asked: list[signal.Signals] = []
    before = {number: signal.getsignal(number) for number in ENDED_BY}

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number))
        for one, handler in before.items():
            signal.signal(one, handler)

    for number in ENDED_BY:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _bar(iterations: int) -> Iterator[Callable[[int, float], None]]:
    with Progress(
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("train", total=iterations, loss=0.0, visible=False)

        def show(iteration: int, loss: float) -> None:
            bar.update(task, completed=iteration, loss=loss, visible=True)

        yield show
