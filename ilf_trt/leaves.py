"""The one door to the leaves and to the torch wings: typed functions that import when they are called."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ilf_trt.contract.progress import Progress
from ilf_trt.errors import MissingDependency

if TYPE_CHECKING:
    from ilf_trt.train.cost import Cost as Cost
    from ilf_trt.train.data.index import Index as Index
    from ilf_trt.train.loop import Outcome as Outcome
    from ilf_trt.train.recipe import Recipe as Recipe


def read_recipe(name: str, changes: Sequence[str] = ()) -> "Recipe":
    """Read a recipe file or a recipe of the package, with `SECTION.KEY=VALUE` changes; raises InvalidRequest."""
    from ilf_trt.train.recipe import Recipe

    return Recipe.read(name, changes)


def train_recipe(
    recipe: "Recipe", output: Path, *, resume: str, cpu: bool, stop: Callable[[], bool], progress: Progress
) -> "Outcome":
    """Train the feedback block of a recipe into `output`; raises MissingDependency, and as `train.run` does."""
    with _needing("training", "train"):
        from ilf_trt.train.run import train_recipe
    return train_recipe(recipe, output, resume=resume, cpu=cpu, stop=stop, progress=progress)


def recipe_cost(recipe: "Recipe", *, processes: int) -> "Cost":
    """Count the cost of a recipe over `processes`; raises MissingDependency, and as `train.cost` does."""
    with _needing("a dry run", "train"):
        from ilf_trt.train.cost import cost_of_recipe
    return cost_of_recipe(recipe, processes)


def train_demo(
    output: Path,
    *,
    seed: int,
    base_iterations: int | None,
    feedback_iterations: int | None,
    threads: int,
    progress: Progress,
) -> None:
    """Train the digits demo into `output`; raises MissingDependency, and as `train.demo` does."""
    with _needing("training", "train,demo"):
        from ilf_trt.train.demo import train
    train(
        output,
        seed=seed,
        base_iterations=base_iterations,
        feedback_iterations=feedback_iterations,
        threads=threads,
        progress=progress,
    )


def prepare_data(
    output: Path,
    *,
    kind: Literal["images", "webdataset"],
    path: str,
    vae: str | None,
    text_encoder: str | None,
    size: int,
    text_tokens: int,
    batch: int,
    dtype: Literal["fp16", "bf16", "fp32"],
    sample: bool,
    shard_size: int,
    device: str,
    workers: int,
    max_broken: int,
    seed: int,
    progress: Progress,
) -> "Index":
    """Write prepared data into `output`; raises MissingDependency, and as `train.data.run` does."""
    with _needing("preparing data", "prepare"):
        from ilf_trt.train.data.run import PrepareOptions, prepare_folder
    options = PrepareOptions(
        kind=kind,
        path=path,
        vae=vae,
        text_encoder=text_encoder,
        size=size,
        text_tokens=text_tokens,
        batch=batch,
        dtype=dtype,
        sample=sample,
        shard_size=shard_size,
        device=device,
        workers=workers,
        max_broken=max_broken,
        seed=seed,
    )
    return prepare_folder(options, output, progress=progress)


@contextmanager
def _needing(work: str, extra: str) -> Iterator[None]:
    """Turn a failed import of the block into MissingDependency, which names the extra to install."""
    try:
        yield
    except ImportError as error:
        if isinstance(error, MissingDependency):
            raise
        raise MissingDependency(f"{work} needs {error.name}; pip install 'ilf-trt[{extra}]'") from error
