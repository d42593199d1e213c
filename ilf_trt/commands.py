"""The commands that belong to no leaf: build, plan, inspect, train-demo."""

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ilf_trt.build import DEFAULT_BATCH, BuildOptions
from ilf_trt.build import build as build_bundle
from ilf_trt.build_view import build_bar, print_build
from ilf_trt.bundle import Bundle, graph_file
from ilf_trt.contract import Batch, Calibrator, Loop, Precision
from ilf_trt.engine_flags import EngineFlags
from ilf_trt.errors import InvalidRequest, MissingDependency
from ilf_trt.manifest import Manifest
from ilf_trt.pipeline_flags import PipelineFlags
from ilf_trt.schedule import (
    DEFAULT_FEEDBACK,
    Ratio,
    Rule,
    StepPlan,
    cached_block_forwards,
    make_plan,
    read_scheduler,
)

MIB = 1 << 20
RatioName = Literal["m/n", "n/m"]


def build(
    *,
    checkpoint: str,
    output: Annotated[Path, Parameter(alias="-o")],
    base: str | None = None,
    precision: Precision = Precision.FP32,
    residual: Literal["fp32"] | None = None,
    batch: str = str(DEFAULT_BATCH),
    steps: int = 10,
    feedback: str = DEFAULT_FEEDBACK,
    rule: Rule = Rule.ANNEAL,
    ratio: RatioName = "m/n",
    scheduler: str | None = None,
    guidance: bool = True,
    guidance_scale: float = 1.5,
    text_tokens: int | None = None,
    pipeline: PipelineFlags = PipelineFlags(),  # noqa: B008
    hoist_text: Annotated[bool, Parameter(negative=())] = False,
    calibration: Path | None = None,
    calibrator: Calibrator = Calibrator.AUTO,
    fp8_exclude: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    device: str = "cpu",
    verify: bool = True,
    max_error: float | None = None,
    engines: EngineFlags = EngineFlags(),  # noqa: B008
    force: bool = False,
) -> None:
    """Build a bundle from an ILF checkpoint: export the graphs, verify them, build engines, put it all in place.

    Example: `ilf-trt build --checkpoint demo --output build/demo.ilf`

    Parameters
    ----------
    checkpoint
        Folder of an ILF checkpoint, or `demo`.
    output
        Folder of the bundle to write.
    base
        Folder or hub id of the frozen backbone, when it is not where the checkpoint says.
    precision
        What the matrix products run in.
    residual
        fp32 keeps the sum that runs through the blocks in float32, for models whose activations pass float16's 65504.
    batch
        Pictures a run may have: N, or MIN:OPT:MAX.
    steps
        Solver steps of the bundle's plan; it can be replaced at run time.
    feedback
        Steps that get feedback: all, none, alternate, first:K, last:K, outer:K, inner:K or numbers 0,1,8,9.
    rule
        Where the network is conditioned after feedback.
    ratio
        Weight of the loop's size in the rule.
    scheduler
        dpmsolver++, ddim, euler, or a diffusers scheduler_config.json; by default the checkpoint's own.
    guidance
        Build for classifier-free guidance (the blocks see every picture twice).
    guidance_scale
        Default strength of guidance; it can be replaced at run time.
    text_tokens
        Length of the text that the graphs take; by default the pipeline's (PixArt-alpha 120, Sigma 300), or 300.
    hoist_text
        Make the text's keys and values once a picture instead of in every block (PixArt).
    calibration
        What FP8's scales come from: an .npz with conditions of some pictures (text, text_mask … or class_labels), or an
        FP8 bundle whose scales shall stay; a model of classes needs none.
    calibrator
        What measures for FP8: auto takes Model Optimizer where it is installed.
    fp8_exclude
        Linears that shall stay in FP16, by shell pattern: transformer_blocks.0.* or *.to_out.0; may be repeated.
    device
        Where PyTorch runs the reference and the calibration: cpu, cuda or cuda:1.
    verify
        Hold every graph and one trajectory against the torch reference before the bundle is put in place, and keep
        that reference in it, so that `ilf-trt verify` can do the same on the machine that serves.
    max_error
        Largest relative difference to accept; by default 1e-4 for fp32, 2e-2 for fp16, 1e-1 for bf16, 2e-1 for fp8.
    force
        Replace an existing bundle.
    """
    if text_tokens is not None and text_tokens < 1:
        raise InvalidRequest(f"text_tokens is {text_tokens}, it must be at least 1")
    if not math.isfinite(guidance_scale):
        raise InvalidRequest(f"guidance_scale is {guidance_scale}, it must be finite")
    options = BuildOptions(
        base=base,
        precision=precision,
        wide_residual=residual == "fp32",
        batch=Batch.parse(batch),
        guidance=guidance,
        guidance_scale=guidance_scale,
        steps=steps,
        feedback=feedback,
        rule=rule,
        ratio=Ratio(ratio),
        scheduler=scheduler,
        text_tokens=text_tokens,
        **pipeline.options(),
        hoist_text=hoist_text,
        calibration=calibration,
        calibrator=calibrator,
        fp8_exclude=fp8_exclude,
        device=device,
        verify=verify,
        max_error=max_error,
        engines=engines.options(),
        strip_graphs=engines.strip_graphs,
        cache=engines.cache_folder(),
    )
    with build_bar(len(options.stages)) as (enter, step):
        result = build_bundle(checkpoint, output, options, force=force, progress=enter, tell=step)
    print_build(result, Console())


def plan(
    *,
    blocks: int,
    steps: int,
    loop: str | None = None,
    feedback: str = DEFAULT_FEEDBACK,
    rule: Rule = Rule.ANNEAL,
    ratio: RatioName = "m/n",
    scheduler: str = "dpmsolver++",
    cache_blocks: int | None = None,
    cache_every: int = 2,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Print a step plan: times, which steps get feedback, and the cost in block forwards.

    Example: `ilf-trt plan --blocks 28 --loop 8:19 --steps 10 --feedback outer:2`

    Parameters
    ----------
    blocks
        Blocks of the backbone.
    steps
        Solver steps.
    loop
        First and last block of the inner loop, BEGIN:END; not needed with `--feedback none` or a cache.
    feedback
        Steps that get feedback: all, none, alternate, first:K, last:K, outer:K, inner:K or numbers 0,1,8,9.
    rule
        Where the network is conditioned after feedback.
    ratio
        Weight of the loop's size in the rule.
    scheduler
        dpmsolver++, ddim, euler, or a diffusers scheduler_config.json.
    cache_blocks
        Print the caching baseline instead: the middle blocks whose results are kept between steps.
    cache_every
        Run the cached blocks anew on every N-th step.
    json_
        Print JSON.
    """
    caching = cache_blocks is not None
    if loop is None and not caching and feedback != "none":
        raise InvalidRequest("a plan with feedback needs --loop BEGIN:END, such as --loop 8:19; or --feedback none")
    made = make_plan(
        read_scheduler(scheduler),
        steps,
        blocks=blocks,
        loop=Loop.parse(loop) if loop else Loop(0, blocks - 1),
        feedback="none" if caching else feedback,
        rule=rule,
        ratio=Ratio(ratio),
    )
    costs = tuple(step.block_forwards for step in made.steps)
    if cache_blocks is not None:
        costs = cached_block_forwards(blocks, steps, cached=cache_blocks, every=cache_every)
    if json_:
        data = made.as_json() | {"block_forwards": sum(costs)}
        for step, cost in zip(data["steps"], costs, strict=True):
            step["block_forwards"] = cost
        print(json.dumps(data, indent=2))  # noqa: T201
    else:
        _print_plan(made, costs, Console())


def inspect(
    bundle: Path,
    /,
    *,
    engines: Annotated[bool, Parameter(negative=())] = False,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
    check: bool = True,
) -> None:
    """Show what a bundle holds: model, graphs and their ports, plan, engines, sizes, versions.

    Example: `ilf-trt inspect build/demo.ilf`

    Parameters
    ----------
    bundle
        Folder of the bundle.
    engines
        Show what is in the engines: layers, the precision that each got, memory, and what is not as it was asked.
    json_
        Print the manifest as JSON, with --engines the engines' reports.
    check
        Check the hash of every file.
    """
    opened = Bundle.open(bundle, check_hashes=check)
    if engines:
        import_module("ilf_trt.engines.view").show_engines(opened, as_json=json_)
        return
    if json_:
        print(json.dumps(opened.manifest.as_json(), indent=2))  # noqa: T201
        return
    console, manifest, spec = Console(), opened.manifest, opened.manifest.spec
    cell = manifest.picture.cell
    facts = {
        "model": f"{spec.kind}, {spec.blocks} blocks, width {spec.width}",
        "loop": f"blocks {spec.loop.begin} to {spec.loop.end}",
        "latent": " x ".join(str(side) for side in spec.latent),
        "sizes": ", ".join(f"{height * cell}x{width * cell}" for height, width in spec.sizes),
        **_beside(manifest),
        "precision": manifest.precision.value + (", residual fp32" if spec.wide_residual else ""),
        "batch": str(manifest.batch),
        "guidance": f"scale {manifest.guidance_scale}" if spec.guidance else "off",
        "conditions": ", ".join(f"{port.name} {port.dtype} {_shape(port.shape)}" for port in spec.conditions),
        "plan": f"{len(manifest.plan.steps)} steps, feedback {manifest.plan.feedback}, "
        f"{manifest.plan.rule.value} {manifest.plan.ratio.value}, {manifest.plan.block_forwards} block forwards",
        "scheduler": str(manifest.scheduler.get("_class_name")),
        **_engine_facts(opened),
        "built with": ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items()),
        "size": f"{opened.size_bytes / MIB:.1f} MiB" + (", every hash checked" if check else ""),
    }
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, Text(value))
    console.print(table)
    graphs = Table("graph", "inputs", "outputs", "MiB")
    for graph in manifest.graphs:
        size_bytes = sum(f.size_bytes for name, f in manifest.files.items() if name.startswith(graph_file(graph.name)))
        ports = (
            "\n".join(f"{p.name} {p.dtype} {_shape(p.shape)}" for p in side) for side in (graph.inputs, graph.outputs)
        )
        graphs.add_row(graph.name, *ports, f"{size_bytes / MIB:.2f}")
    console.print(graphs)
    _print_plan(manifest.plan, tuple(step.block_forwards for step in manifest.plan.steps), console)


def _beside(manifest: Manifest) -> dict[str, str]:
    """What stands around the model."""
    facts, text, decoder = {}, manifest.text, manifest.decoder
    if text is not None:
        facts["text"] = f"{text.tokens} tokens of {text.vocabulary}, {text.channels} channels, {text.precision}"
    if decoder is not None:
        tiles = f", in tiles of {decoder.tile} cells" if decoder.tile else ""
        facts["decoder"] = f"{decoder.scale} pixels to a cell, {decoder.precision}{tiles}"
    if manifest.picture.names:
        facts["classes"] = f"{len(set(manifest.picture.names.values()))} by name"
    return facts


def _engine_facts(bundle: Bundle) -> dict[str, str]:
    facts = {}
    for target in dict.fromkeys(engine.target for engine in bundle.manifest.engines):
        few = [engine for engine in bundle.manifest.engines if engine.target == target]
        size_bytes = sum(bundle.manifest.files[engine.file].size_bytes for engine in few)
        card = f" on {few[0].gpu_name}, driver {few[0].driver}" if few[0].gpu_name else ""
        gpus = ", ".join(few[0].gpus)
        facts[target] = f"{few[0].library_version} for {gpus}{card}, {len(few)} engines, {size_bytes / MIB:.1f} MiB"
    return facts


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
        from ilf_trt.demo import train
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


def _print_plan(made: StepPlan, costs: tuple[int, ...], console: Console) -> None:
    table = Table("step", "t", "t_post", "feedback", "block forwards")
    for index, (step, cost) in enumerate(zip(made.steps, costs, strict=True)):
        table.add_row(str(index), f"{step.t:g}", f"{step.t_post:.1f}", "yes" if step.feedback else "", str(cost))
    console.print(table)
    console.print(f"block forwards: {sum(costs)}", highlight=False)


def _shape(shape: tuple[int | str, ...]) -> str:
    return "x".join(str(dim) for dim in shape)
