"""Holds a bundle's graphs and one whole trajectory against the reference that torch wrote at build time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from ilf_trt.contract.arrays import is_finite
from ilf_trt.contract.bundle import REFERENCE_FILE, Bundle
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.ports import DECODE, TEXT, Graph
from ilf_trt.contract.reference_cases import (
    DECODE_LATENTS,
    DECODE_SHADES,
    REQUESTED,
    TEXT_EMBEDDED,
    TEXT_IDS,
    TEXT_MASK,
    TRAJECTORY,
    TRAJECTORY_NOISE,
    Case,
    cases_of,
)
from ilf_trt.contract.spec import Precision
from ilf_trt.errors import BundleError, NonFinite, ParityError, shown

from .batches import run_batches
from .finite import PRECISION_OPTIONS, remedy
from .pipeline import Pipeline

TINY = 1e-30
EXACT_SHADES, ROUGH_SHADES = 2, 8  # of 255, that a decoder may be off in float32 and in halves


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one tensor is from the reference; `relative` is max |difference| over max |reference|.

    `limit` is the largest acceptable `relative`; None: the limit of the bundle's precision.
    """

    what: str
    max_abs: float
    relative: float
    cosine: float
    limit: float | None = None


def verify(
    path: str | Path, *, device: str = "cpu", engine: str | None = None, built: Manifest | None = None
) -> tuple[tuple[Difference, ...], Precision]:
    """Run every graph and one trajectory of the bundle's plan, on what `Pipeline.load` takes for the same arguments.

    Gives the differences and the precision that says what of them is acceptable. `built` is the manifest whose
    precisions count, for a bundle that restates another one; by default the bundle's own. Raises NonFinite, with the
    name of the first graph whose output holds NaN or infinity, and what `Pipeline.load` and `generate` raise.
    """
    with Pipeline.load(path, device=device, engine=engine) as pipeline:
        manifest = built or pipeline.manifest
        reference = _read(pipeline.bundle) | pipeline.bundle.constants()
        rows = []
        graphs = {graph.name: graph for graph in pipeline.manifest.graphs}
        cases = cases_of(pipeline.manifest.spec)
        needed = {c.outputs.get(p.name, p.name) for c in cases for p in graphs[c.graph].outputs}
        for name in sorted(needed - reference.keys()):
            raise BundleError(f"{path}: the reference lacks {name!r}; build the bundle again")
        for case in cases:
            for name, array in _run(pipeline, graphs[case.graph], case, reference).items():
                rows.append(_difference(manifest, case.graph, name, array, reference[name]))
        ports = pipeline.manifest.spec.conditions
        conditions: dict[str, Any] = {port.name: reference[f"{REQUESTED}{port.name}"] for port in ports}
        result = pipeline.generate(latents=reference[TRAJECTORY_NOISE], decode=False, **conditions)
        rows.append(difference(TRAJECTORY, result.latents, reference[TRAJECTORY]))
        return (*rows, *_parts(pipeline, manifest, reference)), manifest.precision


def check(differences: tuple[Difference, ...], limit: float) -> None:
    """Raise ParityError when a difference is not below `limit` (NaN is not)."""
    for row in differences:
        allowed = limit if row.limit is None else row.limit
        if not row.relative <= allowed:
            option = PRECISION_OPTIONS.get(row.what)
            raise ParityError(
                f"{row.what} differs from the reference by {row.relative:.2e} relative, the limit is {allowed:.0e}; "
                + (
                    f"the most exact is {option} fp32"
                    if option
                    else "build in a higher --precision, or raise --max-error if that is good enough for you"
                ),
                graph=row.what if option else "",
            )


def table(differences: tuple[Difference, ...]) -> Table:
    """The differences for a terminal."""
    rows = Table("graph and tensor", "max abs", "relative", "cosine")
    for row in differences:
        rows.add_row(Text(shown(row.what)), f"{row.max_abs:.2e}", f"{row.relative:.2e}", f"{row.cosine:.9f}")
    return rows


def difference(what: str, result: NDArray[Any], reference: NDArray[Any]) -> Difference:
    """Compare two arrays of one shape in float64."""
    if result.shape != reference.shape:
        raise BundleError(f"{what} has shape {result.shape}, the reference {reference.shape}; build the bundle again")
    a, b = (np.asarray(array, np.float64).ravel() for array in (result, reference))
    max_abs = float(np.abs(a - b).max())
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norm if norm else float(np.array_equal(a, b))
    return Difference(what, max_abs, max_abs / max(float(np.abs(b).max()), TINY), cosine)


def _difference(
    manifest: Manifest, graph: str, tensor: str, result: NDArray[Any], reference: NDArray[Any]
) -> Difference:
    """Compare an output of a graph with the reference, which is finite; raises NonFinite if the output is not."""
    if not is_finite(result):
        part = {TEXT: manifest.text, DECODE: manifest.decoder}.get(graph)
        advice = remedy(
            graph, part.precision if part else manifest.precision, wide_residual=manifest.spec.wide_residual
        )
        raise NonFinite(
            f"graph {graph} gave NaN or infinity in {tensor!r}, the reference is finite; {advice}", graph=graph
        )
    return difference(f"{graph} {tensor}", result, reference)


def _parts(pipeline: Pipeline, manifest: Manifest, reference: Mapping[str, NDArray[Any]]) -> Iterator[Difference]:
    """Text encoder and decoder, each within the limit of its own precision, pixels within two of 255."""
    text, decoder = manifest.text, manifest.decoder
    if text is not None and TEXT_EMBEDDED in reference:
        ids, mask, embedded = (reference[name] for name in (TEXT_IDS, TEXT_MASK, TEXT_EMBEDDED))
        batch = manifest.batch
        texts = [
            pipeline.run(TEXT, {"ids": chunk.take(ids), "ids_mask": chunk.take(mask)})["text"][: chunk.pictures]
            for chunk in run_batches(len(ids), batch)
        ]
        row = _difference(manifest, TEXT, "text", np.concatenate(texts), embedded)
        yield replace(row, what=TEXT, limit=text.precision.parity_limit)
    if decoder is not None and DECODE_SHADES in reference:
        shades = pipeline.run(DECODE, {"latents": reference[DECODE_LATENTS]})["shades"]
        row = _difference(manifest, DECODE, "shades", shades, reference[DECODE_SHADES])
        limit = EXACT_SHADES if decoder.precision is Precision.FP32 else ROUGH_SHADES
        yield replace(row, what=DECODE, relative=row.max_abs / 255, limit=limit / 255)


def _read(bundle: Bundle) -> dict[str, NDArray[Any]]:
    if REFERENCE_FILE not in bundle.manifest.files:
        raise BundleError(f"{bundle.path} was built with --no-verify and holds no reference; build it with --verify")
    return bundle.arrays(REFERENCE_FILE)


def _run(
    pipeline: Pipeline, graph: Graph, case: Case, reference: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Outputs of one run under the names that they bear in the reference."""
    arrays = {}
    for port in graph.inputs:
        array = reference[case.inputs.get(port.name, port.name)]
        row = array[case.time] if array.ndim > len(port.shape) else array
        with np.errstate(over="ignore"):  # an infinity becomes a difference past every limit
            arrays[port.name] = row.astype(port.array_dtype)
    return {case.outputs.get(name, name): array for name, array in pipeline.run(graph.name, arrays).items()}
