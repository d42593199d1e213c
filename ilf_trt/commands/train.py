"""The command `train`: trains the feedback block of a recipe, or prints the cost with --dry-run."""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from ilf_trt.errors import InvalidRequest
from ilf_trt.interrupts import EXIT_BASE, hold_first_signal
from ilf_trt.leaves import read_recipe, recipe_cost, train_recipe

from .log import log_to_terminal
from .numbers import Real, Whole
from .progress_bar import progress_bar
from .terminal import say

if TYPE_CHECKING:
    from ilf_trt.leaves import Cost, Recipe

GIB, MIB, TERA = 1 << 30, 1 << 20, 1e12
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic


def train(
    *,
    config: str,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    resume: str = "auto",
    cpu: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    processes: Whole = 1,
    rate: Real = 400.0,
) -> None:
    """Train the feedback block of a recipe; on several devices with `accelerate launch -m ilf_trt train …`.

    Example: `ilf-trt train --config demo --output build/demo-training`

    Parameters
    ----------
    config
        A recipe: a TOML file, or the name of a recipe in the package.
    output
        Folder of checkpoints, log and samples, and at the end of the ILF checkpoint for `ilf-trt build`.
    set_
        Change a field of the recipe, SECTION.KEY=VALUE; may be repeated.
    resume
        auto: resume from the last checkpoint in the output folder, if any; none; or the folder of a checkpoint.
    cpu
        Train on the CPU even if there is a GPU.
    dry_run
        Print memory, arithmetic, steps and hours, and train nothing; needs no weights.
    processes
        Number of processes for a dry run.
    rate
        TFLOP/s of all devices together, for a dry run.
    """
    recipe = read_recipe(config, set_)
    if dry_run:
        if processes < 1 or not rate > 0:
            raise InvalidRequest(f"processes is {processes} and rate {rate}; both must be above 0")
        _print_cost(recipe, recipe_cost(recipe, processes=processes), processes, rate)
        return
    if output is None:
        raise InvalidRequest("--output is missing; give the folder of the training, or --dry-run")
    os.environ.setdefault(*CUBLAS_WORKSPACE)
    log_to_terminal()
    with hold_first_signal() as signals, progress_bar() as progress:
        outcome = train_recipe(recipe, output, resume=resume, cpu=cpu, stop=lambda: bool(signals), progress=progress)
    if not outcome.main:
        sys.exit(EXIT_BASE + signals[0] if signals else 0)
    if outcome.stopped:
        say(
            f"stopped at iteration {outcome.iteration}, saved; run the same command with --resume auto to resume",
            console=Console(stderr=True),
        )
        sys.exit(EXIT_BASE + (signals[0] if signals else signal.SIGTERM))
    say(
        f"wrote {output}, mean loss {outcome.mean_loss:.4f}",
        f"next: ilf-trt build --checkpoint {output} -o {output}.ilf",
    )


def _print_cost(recipe: "Recipe", cost: "Cost", processes: int, rate: float) -> None:
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
