"""The command `train-demo`: train the packaged digits demo again."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from ilf_trt import leaves

from .numbers import OptionalWhole, Whole
from .progress_bar import progress_bar
from .terminal import say


def train_demo(
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    seed: Whole = 0,
    base_iterations: Annotated[OptionalWhole, Parameter(validator=validators.Number(gte=0))] = None,
    feedback_iterations: Annotated[OptionalWhole, Parameter(validator=validators.Number(gte=1))] = None,
    threads: Annotated[Whole, Parameter(validator=validators.Number(gte=1))] = 1,
) -> None:
    """Train the demo again: a small DiT on scikit-learn's real digits, then its feedback block.

    Example: `ilf-trt train-demo --output build/demo-checkpoint`

    Parameters
    ----------
    output
        Folder of the ILF checkpoint and of its base.
    seed
        Seed of both trainings.
    base_iterations
        Iterations of the base; by default those of the packaged demo. 0 keeps the base in the output folder.
    feedback_iterations
        Iterations of the feedback block; by default those of the packaged demo.
    threads
        Torch threads; the packaged demo used 1, another number changes the rounding.
    """
    with progress_bar() as progress:
        leaves.train_demo(
            output,
            seed=seed,
            base_iterations=base_iterations,
            feedback_iterations=feedback_iterations,
            threads=threads,
            progress=progress,
        )
    say(f"wrote {output}", f"next: ilf-trt build --checkpoint {output} --output {output}.ilf")
