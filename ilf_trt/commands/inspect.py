"""The command `inspect`: show what a bundle holds."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from ilf_trt import leaves
from ilf_trt.contract.bundle import Bundle, graph_file
from ilf_trt.contract.manifest import Manifest

from .plan import print_plan
from .terminal import cell

MIB = 1 << 20


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
        Show what is in the engines: layers, the precision that each got, memory, and what differs from the request.
    json_
        Print the manifest as JSON, with --engines the engines' reports.
    check
        Check the hash of every file.
    """
    opened = Bundle.open(bundle, check_hashes=check)
    if engines:
        leaves.show_engines(opened, as_json=json_)
        return
    if json_:
        print(json.dumps(opened.manifest.as_json(), indent=2))  # noqa: T201
        return
    console, manifest, spec = Console(), opened.manifest, opened.manifest.spec
    side = manifest.picture.cell
    facts = {
        "model": f"{spec.kind}, {spec.blocks} blocks, width {spec.width}",
        "base": manifest.base_sha256[:12]
        + (", another than the feedback block was trained on" if manifest.base_differs else ""),
        "loop": f"blocks {spec.loop.begin} to {spec.loop.end}",
        "latent": " x ".join(map(str, spec.latent)),
        "sizes": ", ".join(f"{height * side}x{width * side}" for height, width in spec.sizes),
        **_parts(manifest),
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
        table.add_row(cell(name), cell(value))
    console.print(table)
    graphs = Table("graph", "inputs", "outputs", "MiB")
    for graph in manifest.graphs:
        size_bytes = sum(f.size_bytes for name, f in manifest.files.items() if name.startswith(graph_file(graph.name)))
        ports = (
            cell(*(f"{p.name} {p.dtype} {_shape(p.shape)}" for p in side)) for side in (graph.inputs, graph.outputs)
        )
        graphs.add_row(cell(graph.name), *ports, f"{size_bytes / MIB:.2f}")
    console.print(graphs)
    print_plan(manifest.plan, tuple(step.block_forwards for step in manifest.plan.steps), console)


def _parts(manifest: Manifest) -> dict[str, str]:
    """The pipeline's parts and classes."""
    facts, text, decoder = {}, manifest.text, manifest.decoder
    if text is not None:
        captions = "cleaned" if manifest.clean_captions else "as they are"
        facts["text"] = f"{text.tokens} tokens of {text.vocabulary}, {text.channels} channels, {text.precision}"
        facts["captions"] = captions
    if decoder is not None:
        tiles = f", in tiles of {decoder.tile} cells" if decoder.tile else ""
        facts["decoder"] = f"{decoder.scale} pixels to a cell, {decoder.precision}{tiles}"
    if manifest.picture.names:
        facts["classes"] = f"{len(set(manifest.picture.names.values()))} by name"
    return facts


def _engine_facts(bundle: Bundle) -> dict[str, str]:
    facts = {}
    for target in dict.fromkeys(engine.target for engine in bundle.manifest.engines):
        engines = [engine for engine in bundle.manifest.engines if engine.target == target]
        size_bytes = sum(bundle.manifest.files[engine.file].size_bytes for engine in engines)
        card = f" on {engines[0].gpu_name}, driver {engines[0].driver}" if engines[0].gpu_name else ""
        gpus = ", ".join(engines[0].gpus)
        facts[target] = (
            f"{engines[0].library_version} for {gpus}{card}, {len(engines)} engines, {size_bytes / MIB:.1f} MiB"
        )
    return facts


def _shape(shape: tuple[int | str, ...]) -> str:
    return "x".join(str(dim) for dim in shape)
