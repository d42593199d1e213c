"""The command `bench`: measure a bundle against eager PyTorch and other rivals, or under a stream of requests."""

import json
import sys
from contextlib import closing, nullcontext
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from ilf_trt import leaves
from ilf_trt.assembly.packaged_bundle import bundle_of
from ilf_trt.bench.comparison import compare, read_measured
from ilf_trt.bench.comparison_view import comparison_view
from ilf_trt.bench.conductor import Conductor
from ilf_trt.bench.environment import Environment, public_command
from ilf_trt.bench.gpu_probe import GpuProbe, clock_words
from ilf_trt.bench.load import Load, pipeline_target, run_load
from ilf_trt.bench.load_result import LOAD_FILE, LoadResult
from ilf_trt.bench.load_view import print_load
from ilf_trt.bench.options import DEFAULT_MAX_S, DEFAULT_STEPS, DEFAULT_WITHIN, BenchOptions
from ilf_trt.bench.result import Result
from ilf_trt.bench.results_folder import ResultsFolder
from ilf_trt.bench.row import Boundary, Rival
from ilf_trt.bench.scores import Score
from ilf_trt.bench.terminal_view import head_lines, live_table, outcome_view, rows_view
from ilf_trt.contract.arrays import numbers_of
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.device import ordinal_of
from ilf_trt.contract.packaged import find_packaged
from ilf_trt.errors import BenchmarkFailed, InvalidRequest
from ilf_trt.files import write_whole
from ilf_trt.interrupts import EXIT_BASE, hold_first_signal

from .flags import CacheFolder, size_of
from .numbers import OptionalReal, OptionalWhole, Real, Whole
from .progress_bar import progress_bar
from .terminal import say

PERCENT = "%"
COLUMNS = 100  # of a table in a file or a pipe


def bench(
    bundle: str | None = None,
    /,
    *,
    against: str | None = None,
    checkpoint: str | None = None,
    device: str = "cpu",
    engine: str | None = None,
    batch: str = "1",
    boundary: Boundary = Boundary.DENOISE,
    steps: Whole = DEFAULT_STEPS,
    ilf_steps: OptionalWhole = None,
    feedback: str | None = None,
    plans: str | None = None,
    prompt: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    labels: str | None = None,
    size: str | None = None,
    seed: Whole = 0,
    guidance_scale: OptionalReal = None,
    torch_precision: str | None = None,
    threads: Whole = 0,
    quality_pictures: Whole = 0,
    scores: str | None = None,
    within: str = f"{DEFAULT_WITHIN:.0%}",
    max_seconds: Real = DEFAULT_MAX_S,
    clients: OptionalWhole = None,
    rate: OptionalReal = None,
    requests: OptionalWhole = None,
    sessions: Whole = 4,
    compare_: Annotated[
        tuple[Path, Path] | None, Parameter(name="--compare", negative=(), consume_multiple=True)
    ] = None,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    cache_dir: CacheFolder = None,
) -> None:
    """Measure a bundle: its engines alone, or in turns with eager PyTorch and other rivals.

    Example: `ilf-trt bench build/demo.ilf --against eager --checkpoint demo`

    Parameters
    ----------
    bundle
        Folder of the bundle; `demo` and `demo-emoji` are built once from the package and kept in the cache.
    against
        What to compare with: eager, compile, cache (the paper's), cache-dit, onnx (diffusers' own graph), one-graph (a
        whole step as one graph). They run on the checkpoint.
    checkpoint
        The ILF checkpoint that the bundle was built from.
    device
        Where to run: cpu, cuda or cuda:1.
    engine
        What runs the bundle's graphs on a GPU.
    batch
        Pictures at once: 1, or 1,4 to measure both.
    boundary
        What is inside of a time: denoise (from noise and embedded text to latents) or end-to-end (from the request to
        pixels).
    steps
        Steps of the plain rows.
    ilf_steps
        Steps of the ILF rows, instead of the bundle's.
    feedback
        Steps that get feedback, instead of the bundle's.
    plans
        More plans for the engines, STEPS:FEEDBACK each: "12:none 7:outer:2". Each with feedback gets its plain plan of
        equal cost.
    prompt
        What the pictures show; repeat it for several.
    labels
        Classes of the pictures: 3,8 or 0-9.
    size
        HEIGHTxWIDTH in pixels, of those that the bundle was built for.
    seed
        Seed of the noise, which is the same in every row.
    guidance_scale
        Strength of classifier-free guidance, instead of the bundle's.
    torch_precision
        What PyTorch runs in: fp32, fp16 or bf16; by default fp32 on a CPU and fp16 on a GPU.
    threads
        Threads of the CPU for every row; 0 leaves the number to each library.
    quality_pictures
        Pictures to compare with eager PyTorch's, at least one batch.
    scores
        Scores of those pictures by their prompts: clip-score, image-reward; each needs its extra.
    within
        Measure until every ratio is known to ± this share.
    max_seconds
        Most seconds that the turns of a batch, or a stream of requests, take.
    clients
        Send requests from so many clients instead; without --rate, each waits for its answer.
    rate
        Send requests at random at this rate a second instead (Poisson arrivals).
    requests
        End the stream after so many requests.
    sessions
        Generations that the pipeline runs at once under a stream of requests.
    compare_
        Two result.json, or their folders: say what changed, and measure nothing.
    output
        Folder for the samples, the result and its reports; of a stream, for load.json.
    resume
        Go on with the samples in --output.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=COLUMNS)
    if compare_ is not None:
        console.print(comparison_view(compare(*map(read_measured, compare_))))
        return
    if bundle is None:
        raise InvalidRequest("bench needs a bundle, or --compare A B; build one with ilf-trt build")
    known = find_packaged(bundle)
    if clients is not None or rate is not None:
        load = Load.of(clients, rate, requests=requests, max_seconds=max_seconds, warm_ups=2 * sessions, seed=seed)
        for flag, given in (
            ("--against", against),
            ("--plans", plans),
            ("--torch-precision", torch_precision),
            ("--quality-pictures", quality_pictures),
            ("--scores", scores),
            ("--resume", resume),
            ("more than one --batch", "," in batch),
        ):
            if given:
                raise InvalidRequest(f"{flag} is about rows in turns; leave it out, or leave out --clients and --rate")
    elif requests is not None:
        raise InvalidRequest("--requests is about a stream of requests; pass --clients or --rate too")
    else:
        load = None
    options = BenchOptions(
        bundle=bundle_of(bundle, cache_dir),
        checkpoint=checkpoint or (None if known is None else known.name),
        against=() if against is None else Rival.parse_all(against),
        device=device,
        engine=engine,
        batches=tuple(numbers_of(batch, "--batch")),
        boundary=boundary,
        steps=steps,
        ilf_steps=ilf_steps,
        feedback=feedback,
        plans=() if plans is None else tuple(plans.split()),
        prompts=prompt,
        labels=() if labels is None else tuple(numbers_of(labels, "--labels")),
        size=None if size is None else size_of(size),
        seed=seed,
        guidance_scale=guidance_scale,
        torch_precision=torch_precision,
        threads=threads,
        quality_pictures=quality_pictures,
        scores=() if scores is None else Score.parse_all(scores),
        within=_share(within),
        max_s=max_seconds,
    )
    options.check()
    if load is None:
        _measure(options, output, console, resume=resume)
    else:
        _send(options, load, sessions, output, console)


def _measure(options: BenchOptions, output: Path | None, console: Console, *, resume: bool) -> None:
    """Measure rows in turns; show them as they grow, and write the folder."""
    ordinal = ordinal_of(options.device)
    probe = None if ordinal is None else GpuProbe.open(ordinal)
    environment = Environment.of(sys.argv, probe.read() if probe else None)
    if resume and output is None:
        raise InvalidRequest("--resume goes on in a folder; pass -o FOLDER too")
    folder = None if output is None else ResultsFolder(output, _asked(options, environment), resume=resume)
    with closing(folder) if folder is not None else nullcontext():
        with hold_first_signal() as signals, live_table(console) as table:
            conductor = Conductor(
                options,
                public_command(sys.argv),
                probe=probe,
                begin=folder.begin if folder is not None else lambda _: None,
                write=folder.write if folder is not None else lambda _: None,
                show=table.update,
                tell=table.tell,
                stop=lambda: bool(signals),
                earlier=folder.earlier if folder is not None else (),
            )
            if environment.gpu is not None:
                say(clock_words(environment.gpu), console=console)
            result = conductor.run()
        say(*head_lines(result), console=console)
        console.print(rows_view(result.rows))
        console.print(outcome_view(result))
        if folder is not None:
            say(*(f"wrote {path}" for path in folder.finish(result, environment, conductor.pictures)), console=console)
    if signals:
        sys.exit(EXIT_BASE + signals[0])
    _check_rows(result)


def _send(options: BenchOptions, load: Load, sessions: int, output: Path | None, console: Console) -> None:
    """Drive the pipeline in this process with a stream of requests."""
    with leaves.load_pipeline(
        options.bundle, device=options.device, engine=options.engine, threads=options.threads, sessions=sessions
    ) as pipeline:
        request = _request(pipeline, options)
        pipeline.warm_up(options.batches[0], request["plan"], size=options.size)
        with hold_first_signal() as signals, progress_bar() as progress:
            run = run_load(
                load,
                pipeline_target(pipeline, request),
                stop=lambda: bool(signals),
                turn_away=pipeline.close,
                progress=progress,
            )
    result = LoadResult.of(load, run)
    print_load(result, console)
    if output is not None:
        place = output / LOAD_FILE
        write_whole(place, json.dumps(result.as_json(), indent=1).encode() + b"\n")
        say(f"wrote {place}", console=console)
    if signals:
        sys.exit(EXIT_BASE + signals[0])


def _request(pipeline: Any, options: BenchOptions) -> dict[str, Any]:
    """What every request of a stream asks for, but for its seed."""
    count, manifest = options.batches[0], pipeline.manifest
    plan = pipeline.plan(options.ilf_steps, feedback=options.feedback)
    request: dict[str, Any] = {"plan": plan, "decode": options.boundary is Boundary.END_TO_END}
    if options.guidance_scale is not None:
        request["guidance_scale"] = options.guidance_scale
    if options.size is not None:
        request["size"] = options.size
    if options.prompts or manifest.text is not None:
        return {**request, "prompt": list(islice(cycle(options.prompts or ("a photo",)), count))}
    return {**request, "class_labels": list(islice(cycle(options.labels or (0,)), count))}


def _asked(options: BenchOptions, environment: Environment) -> dict[str, Any]:
    """What decides what is measured, as plain data, and where; when to stop does not."""
    data = asdict(options)
    for name in ("within", "max_s"):
        del data[name]
    machine = [environment.cpu, environment.usable_cores, environment.gpu.name if environment.gpu else ""]
    digest = Bundle.open(options.bundle, check_hashes=False).manifest.digest
    return {**data, "bundle": digest, "machine": machine, "versions": environment.versions}


def _check_rows(result: Result) -> None:
    failed = [row for row in result.rows if row.failed]
    if failed:
        first = failed[0]
        raise BenchmarkFailed(f"{len(failed)} of {len(result.rows)} rows failed; {first.title}: {first.failed}")


def _share(text: str) -> float:
    """`"2%"` or `"0.02"` -> 0.02; raises InvalidRequest."""
    number = text.removesuffix(PERCENT)
    try:
        value = float(number)
    except ValueError as error:
        raise InvalidRequest(f"--within is {text[:20]!r}, expected a share such as 2% or 0.02") from error
    return value / 100 if text.endswith(PERCENT) else value
