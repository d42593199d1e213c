"""The commands of the runtime: generate, replay and verify."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter, validators
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ilf_trt.assembly.packaged_bundle import bundle_of
from ilf_trt.commands.flags import CacheFolder, MaxError, MaxMemory, bytes_of, size_of
from ilf_trt.commands.log import log_to_terminal
from ilf_trt.commands.numbers import OptionalReal, OptionalWhole, Whole
from ilf_trt.commands.progress_bar import progress_bar
from ilf_trt.commands.terminal import say
from ilf_trt.contract.arrays import numbers_of, read_conditions
from ilf_trt.contract.packaged import find_packaged
from ilf_trt.contract.plan import Rule
from ilf_trt.contract.progress import Progress
from ilf_trt.errors import InvalidRequest, shown

from .command_files import array_in, check_place, plan_in, prompts_in, save_latents
from .engine import EngineKind
from .picture.png import grid, pixels_from_latents, save_png
from .picture.png_file import PngFile
from .pipeline import Pipeline
from .provenance import Provenance, changes
from .replay import Replayed, find_bundle
from .replay import replay as run_replay
from .result import COLUMNS, Result
from .start_noise import NoiseSource
from .verify import check, table
from .verify import verify as run_verify

log = logging.getLogger(__name__)

DIFFERS = 1


def generate(
    bundle: str,
    prompts: tuple[str, ...] = (),
    /,
    *,
    prompts_file: Annotated[Path | None, Parameter(name="--prompts")] = None,
    negative_prompt: str | None = None,
    labels: Annotated[str | None, Parameter(alias="--class-labels")] = None,
    conditions: Path | None = None,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    latents_out: Annotated[Path | None, Parameter(alias="--latents")] = None,
    latents_in: Path | None = None,
    size: str | None = None,
    seed: str = "0",
    noise: NoiseSource = NoiseSource.TORCH,
    steps: OptionalWhole = None,
    feedback: str | None = None,
    rule: Rule | None = None,
    ratio: Literal["m/n", "n/m"] | None = None,
    plan: Path | None = None,
    guidance_scale: OptionalReal = None,
    clean_captions: bool | None = None,
    binning: bool = True,
    columns: Annotated[Whole, Parameter(validator=validators.Number(gte=1))] = COLUMNS,
    metadata: bool = True,
    device: str = "cpu",
    engine: EngineKind | None = None,
    profile: Annotated[bool, Parameter(negative=())] = False,
    low_memory: Annotated[bool, Parameter(negative=())] = False,
    max_memory: MaxMemory = None,
    threads: Whole = 0,
    cache: CacheFolder = None,
) -> None:
    """Make pictures from a bundle, without PyTorch.

    Example: `ilf-trt generate demo-emoji "smiling cat" -o cat.png`

    Parameters
    ----------
    bundle
        Folder of the bundle; `demo` and `demo-emoji` are built once from the package and kept in the cache.
    prompts
        What the pictures shall show, one text each.
    prompts_file
        A text file of prompts, one a line.
    negative_prompt
        What no picture shall show.
    labels
        Classes, one picture each: 3,8 or 0-9, or their names: goldfish,red fox.
    conditions
        An .npz with the bundle's condition ports (text, text_mask, negative_text …), for embeddings made elsewhere.
    output
        PNG to write, one grid of all pictures.
    latents_out
        .npy to write the latents to, float32 (B, C, H, W).
    latents_in
        .npy with start noise of unit variance, float32 (B, C, H, W), instead of a seed.
    size
        HEIGHTxWIDTH in pixels, of those that the bundle was built for.
    seed
        One seed for the batch, as diffusers draws with one generator; or one for each picture, 1,2,3 or 0-9.
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
        Strength of classifier-free guidance, instead of the bundle's; 1 or less turns guidance off, as in diffusers,
        and halves the cost.
    clean_captions
        Take links, tags and the like out of the prompts; by default as the bundle's diffusers pipeline does.
    binning
        Make the nearest size that the model was trained on, then scale and crop to `size`.
    columns
        Pictures in a row of the grid.
    metadata
        Write into the PNG what made it, also the prompts, so that `ilf-trt replay` can make it again.
    device
        Where to run: cpu, cuda or cuda:1.
    engine
        What runs the graphs on a GPU; by default the bundle's own engines, or ONNX Runtime when it has none.
    profile
        Time every graph on a GPU. The GPU then launches the graphs one by one.
    low_memory
        Load text encoder, transformer and decoder one after another, and free each before the next.
    max_memory
        Most memory of the host that the bundle's files and the generation may take, GiB; by default a share of the
        machine's.
    threads
        Engine threads of the CPU; 0 leaves the number to the library, 1 is faster for tiny models.
    """
    if output is None and latents_out is None:
        raise InvalidRequest("nothing to write; pass -o PICTURE.png or --latents-out LATENTS.npy")
    for option, place, suffix in (("--output", output, ".png"), ("--latents-out", latents_out, ".npy")):
        if place is not None:
            check_place(option, place, suffix)
    log_to_terminal()
    arrays: dict[str, Any] = {} if conditions is None else read_conditions(conditions)
    texts = (*prompts, *(prompts_in(prompts_file) if prompts_file else ()))
    seeds = numbers_of(seed, "seed")
    with Pipeline.load(
        bundle_of(bundle, cache),
        device=device,
        engine=engine,
        threads=threads,
        sessions=1,
        low_memory=low_memory,
        max_memory=None if max_memory is None else bytes_of(max_memory),
    ) as pipeline:
        manifest = pipeline.manifest
        if output is not None and manifest.decoder is None:
            pixels_from_latents(np.zeros((1, *manifest.spec.latent), np.float32))
        ports = [port.name for port in manifest.spec.conditions]
        for name in arrays.keys() - set(ports):
            raise InvalidRequest(f"{name!r} is not a condition of this bundle; it takes {', '.join(ports)}")
        if labels is not None:
            arrays["class_labels"] = _labels(labels)
        with _progress() as progress:
            result = pipeline.generate(
                texts or None,
                negative_prompt=negative_prompt,
                size=None if size is None else size_of(size),
                seed=seeds[0] if len(seeds) == 1 else seeds,
                latents=None if latents_in is None else array_in(latents_in),
                noise=noise,
                guidance_scale=guidance_scale,
                clean_captions=clean_captions,
                binning=binning,
                decode=output is not None,
                profile=profile,
                progress=progress,
                plan=plan_in(plan) if plan else pipeline.plan(steps, feedback=feedback, rule=rule, ratio=ratio),
                **arrays,
            )
    if latents_out is not None:
        save_latents(latents_out, result.latents)
    if output is not None and result.pixels is not None:
        record = _record(result.provenance(columns), bundle) if metadata else None
        save_png(output, grid(result.pixels, columns), record)
    _print_result(result, [path for path in (output, latents_out) if path is not None])


def replay(
    picture: Path,
    /,
    *,
    bundle: str | None = None,
    conditions: Path | None = None,
    latents_in: Path | None = None,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    device: str = "cpu",
    engine: EngineKind | None = None,
    max_memory: MaxMemory = None,
    threads: Whole = 0,
    cache: CacheFolder = None,
) -> None:
    """Make a picture of `generate` again from the record in its PNG, and say whether it is the same to the bit.

    The exit code is 0 for the same picture, 1 for another one, and 2 for one that cannot be made again.

    Example: `ilf-trt replay cat.png`

    Parameters
    ----------
    picture
        PNG that `ilf-trt generate` wrote.
    bundle
        Folder of the bundle; by default the packaged one, or that of the recorded name and digest, here or beside the
        picture.
    conditions
        The .npz that the picture was made with, if it was; its record has only a digest of it.
    latents_in
        The .npy with start noise that the picture was made with, if it was.
    output
        PNG to write the new picture to.
    device
        Where to run: cpu, cuda or cuda:1.
    engine
        What runs the graphs on a GPU; by default the bundle's own engines, or ONNX Runtime when it has none.
    max_memory
        Most memory of the host that the bundle's files and the generation may take, GiB; by default a share of the
        machine's.
    threads
        Engine threads of the CPU; 0 leaves the number to the library, 1 is faster for tiny models.
    """
    if output is not None:
        check_place("--output", output, ".png")
    log_to_terminal()
    png = PngFile.read(picture)
    provenance = Provenance.decoded(png.record)
    arrays = {} if conditions is None else read_conditions(conditions)
    noise = None if latents_in is None else array_in(latents_in)
    provenance.arguments(arrays, noise)  # refuses other files before a bundle is built or loaded
    place = find_bundle(provenance.origin, picture, cache) if bundle is None else bundle_of(bundle, cache)
    options: dict[str, Any] = {"device": device, "engine": engine, "threads": threads, "sessions": 1}
    most = None if max_memory is None else bytes_of(max_memory)
    with Pipeline.load(place, **options, max_memory=most) as pipeline, _progress() as progress:
        again = run_replay(pipeline, png, provenance, arrays, noise, progress=progress)
    if output is not None:
        name = provenance.origin.bundle if bundle is None else bundle
        save_png(output, again.sheet, _record(again.provenance, name))
    _print_replayed(provenance, again, output)
    if not again.agreement.same:
        raise SystemExit(DIFFERS)


def verify(
    bundle: Path,
    /,
    *,
    device: str = "cpu",
    engine: EngineKind | None = None,
    max_error: MaxError = None,
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
        times.add_row(Text(shown(name)), f"{milliseconds:.1f}", f"{milliseconds / timings.total_ms:.0%}")
    if timings.graph_ms:
        console.print(times)
    console.print(
        f"{len(result.latents)} pictures, {len(steps)} steps, {sum(step.feedback for step in steps)} with feedback, "
        f"{result.plan.block_forwards} block forwards: {timings.total_ms:.0f} ms",
        highlight=False,
    )
    say(*(f"wrote {path}" for path in written), console=console)


def _print_replayed(provenance: Provenance, again: Replayed, written: Path | None) -> None:
    console, agreement = Console(), again.agreement
    found = changes(provenance.origin, again.provenance.origin)
    if agreement.same:
        say("the same to the bit", console=console)
    else:
        say(
            f"not the same: by up to {agreement.largest} of 255, in {agreement.share:.2%} of the pixels, PSNR "
            f"{agreement.psnr_db:.1f} dB",
            console=console,
        )
    for fact, then, now in found:
        say(f"another {fact}: {shown(then)} then, {shown(now)} now", console=console)
    if not found and not agreement.same:
        say(
            "all that the record names is the same: the picture was edited, or the engine is not steady",
            console=console,
        )
    if written is not None:
        say(f"wrote {written}", console=console)


def _record(provenance: Provenance, bundle: str) -> bytes | None:
    """The record for a PNG, with the name of a packaged bundle; None, with a warning, if it is too large."""
    if find_packaged(bundle) is not None:
        provenance = replace(provenance, origin=replace(provenance.origin, bundle=bundle))
    try:
        return provenance.encoded()
    except InvalidRequest as error:
        log.warning("%s; the picture is written without it", error)
        return None


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar of the steps if somebody sees it; on a GPU it would keep the trajectory from being launched as one."""
    if not Console(stderr=True).is_terminal:
        yield None
        return
    with progress_bar() as progress:
        yield progress


def _labels(text: str) -> list[int] | list[str]:
    """Numbers, or names where there is a letter."""
    if any(character.isalpha() for character in text):
        return [name.strip() for name in text.split(",")]
    return numbers_of(text, "labels")
