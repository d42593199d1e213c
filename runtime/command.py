"""The commands of the runtime: generate and verify."""

import json
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ilf_trt.conditions import numbers_of, read_conditions
from ilf_trt.errors import InvalidRequest
from ilf_trt.schedule import Rule, StepPlan

from .compatibility import EngineKind
from .noise import NoiseSource
from .picture import grid, pixels_from_latents, save_png
from .pipeline import Pipeline, Result
from .verify import check, table
from .verify import verify as run_verify


def generate(
    bundle: Path,
    /,
    *,
    labels: Annotated[str | None, Parameter(alias="--class-labels")] = None,
    conditions: Path | None = None,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    latents_out: Annotated[Path | None, Parameter(alias="--latents")] = None,
    latents_in: Path | None = None,
    seed: str = "0",
    noise: NoiseSource = NoiseSource.TORCH,
    steps: int | None = None,
    feedback: str | None = None,
    rule: Rule | None = None,
    ratio: Literal["m/n", "n/m"] | None = None,
    plan: Path | None = None,
    guidance_scale: float | None = None,
    columns: int = 10,
    device: str = "cpu",
    engine: EngineKind | None = None,
    profile: Annotated[bool, Parameter(negative=())] = False,
    threads: int = 0,
) -> None:
    """Make pictures from a bundle, without PyTorch.

    Example: `ilf-trt generate build/demo.ilf --labels 0-9 --seed 7 -o build/demo.png`

    Parameters
    ----------
    bundle
        Folder of the bundle.
    labels
        Classes, one picture each: 3,8 or 0-9.
    conditions
        An .npz with the bundle's condition ports (text, text_mask, negative_text …), for models without classes.
    output
        PNG to write, one grid of all pictures.
    latents_out
        .npy to write the latents to, float32 (B, C, H, W).
    latents_in
        .npy with start noise of unit variance, float32 (B, C, H, W), instead of a seed.
    seed
        One seed for the batch, as diffusers draws with one generator; or one for each picture, 1,2,3.
    noise
        Whose generator the seed is for.
    steps
        Solver steps, instead of the bundle's.
    feedback
        Steps that get feedback, instead of the bundle's.
    rule
        Rule of the time after feedback, instead of the bundle's.
    ratio
        Ratio of that rule, instead of the bundle's.
    plan
        A whole plan as JSON, as `ilf-trt plan --json` prints it, instead of all four.
    guidance_scale
        Strength of classifier-free guidance, instead of the bundle's.
    columns
        Pictures in a row of the grid.
    device
        Where to run: cpu, cuda or cuda:1.
    engine
        What runs the graphs on a GPU; by default the bundle's own engines, or ONNX Runtime when it has none.
    profile
        Time every graph on a GPU, which costs the launch as one.
    threads
        Engine threads of the CPU; 0 leaves the number to the library, 1 is faster for tiny models.
    """
    if output is None and latents_out is None:
        raise InvalidRequest("nothing to write; pass -o PICTURE.png or --latents-out LATENTS.npy")
    given: dict[str, Any] = {} if conditions is None else read_conditions(conditions)
    if labels is not None:
        given["class_labels"] = numbers_of(labels, "labels")
    seeds = numbers_of(seed, "seed")
    with Pipeline.load(bundle, device=device, engine=engine, threads=threads) as pipeline:
        if output is not None and pipeline.manifest.spec.latent[0] not in (1, 3):
            pixels_from_latents(np.zeros((1, *pipeline.manifest.spec.latent), np.float32))
        known = [port.name for port in pipeline.manifest.spec.conditions]
        for name in given.keys() - set(known):
            raise InvalidRequest(f"{name!r} is not a condition of this bundle; it takes {', '.join(known)}")
        result = pipeline.generate(
            seed=seeds[0] if len(seeds) == 1 else seeds,
            latents=None if latents_in is None else _array(latents_in),
            noise=noise,
            guidance_scale=guidance_scale,
            profile=profile,
            plan=_plan(plan) if plan else pipeline.plan(steps, feedback=feedback, rule=rule, ratio=ratio),
            **given,
        )
    if latents_out is not None:
        _save(latents_out, result.latents)
    if output is not None:
        save_png(output, grid(pixels_from_latents(result.latents), columns))
    _print_result(result, [path for path in (output, latents_out) if path is not None])


def verify(
    bundle: Path,
    /,
    *,
    device: str = "cpu",
    engine: EngineKind | None = None,
    max_error: float | None = None,
) -> None:
    """Hold every graph and one whole trajectory of a bundle against the torch reference inside it.

    Example: `ilf-trt verify build/demo.ilf`

    Parameters
    ----------
    bundle
        Folder of the bundle.
    device
        Where to run: cpu, cuda or cuda:1.
    engine
        What runs the graphs on a GPU; by default the bundle's own engines, or ONNX Runtime when it has none.
    max_error
        Largest relative difference to accept; by default 1e-4 for fp32, 2e-2 for fp16, 1e-1 for bf16, 2e-1 for fp8.
    """
    differences, precision = run_verify(bundle, device=device, engine=engine)
    Console().print(table(differences))
    check(differences, precision.parity_limit if max_error is None else max_error)


def _print_result(result: Result, written: list[Path]) -> None:
    console, timings, steps = Console(), result.timings, result.plan.steps
    times = Table("graph", "ms", "share")
    for name, milliseconds in timings.graph_ms.items():
        times.add_row(name, f"{milliseconds:.1f}", f"{milliseconds / timings.total_ms:.0%}")
    if timings.graph_ms:
        console.print(times)
    console.print(
        f"{len(result.latents)} pictures, {len(steps)} steps, {sum(step.feedback for step in steps)} with feedback, "
        f"{result.plan.block_forwards} block forwards: {timings.total_ms:.0f} ms",
        highlight=False,
    )
    for path in written:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


def _plan(path: Path) -> StepPlan:
    try:
        return StepPlan.from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{path} is not a readable plan ({error}); make one with ilf-trt plan --json") from error


def _array(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidRequest(f"{path} is not a readable .npy ({error}); write it with numpy.save") from error
    if not isinstance(array, np.ndarray):
        raise InvalidRequest(f"{path} holds several arrays, expected one; write it with numpy.save")
    return array


def _save(path: Path, latents: NDArray[np.float32]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.save(file, latents, allow_pickle=False)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror or error}; choose another --latents-out") from error
