"""The command `train-demo`: train the packaged digits demo again."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ilf_trt.errors import MissingDependency


def train_demo(
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    seed: int = 0,
    base_iterations: Annotated[int | None, Parameter(validator=validators.Number(gte=0))] = None,
    feedback_iterations: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    threads: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 1,
) -> None:
    """Train the demo anew: a small DiT on scikit-learn's real digits, then its feedback block.

    Example: `ilf-trt train-demo --output build/demo-checkpoint`

    Parameters
    ----------
    output
        Folder of the ILF checkpoint to write, its base beside it.
    seed
        Seed of both trainings.
    base_iterations
        Iterations of the base; by default those of the shipped demo. 0 keeps the base that lies in the output folder.
    feedback_iterations
        Iterations of the feedback block; by default those of the shipped demo.
    threads
        Torch threads; the shipped demo was trained on 1, another number changes the rounding.
    """
    try:
        from ilf_trt.train.demo import train
    except ImportError as error:
        raise MissingDependency(f"training needs {error.name}; pip install 'ilf-trt[train,demo]'") from error
    with Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as bar:
        tasks = {stage: bar.add_task(stage, total=None, loss=0.0) for stage in ("base", "feedback")}
        train(
            output,
            seed=seed,
            base_iterations=base_iterations,
            feedback_iterations=feedback_iterations,
            threads=threads,
            progress=lambda stage, done, total, loss: bar.update(tasks[stage], completed=done, total=total, loss=loss),
        )
    Console().print(f"wrote {output}\nnext: ilf-trt build --checkpoint {output} --output {output}.ilf", highlight=False)
