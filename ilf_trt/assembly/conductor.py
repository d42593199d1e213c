"""The conductor of a build: export, verify, compile, put in place. Each stage is loaded when its turn comes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ilf_trt import leaves
from ilf_trt.contract.bundle import Bundle, strip_graphs
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.progress import Progress, no_progress
from ilf_trt.contract.spec import Precision
from ilf_trt.contract.target import EngineOptions
from ilf_trt.errors import NonFinite, ParityError

from .build_cache import BuildCache
from .options import BuildOptions, PipelinePart
from .stages import Stages
from .staging import staging_folder

if TYPE_CHECKING:
    from ilf_trt.leaves import Compiler, Difference, EngineReport, Exported

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuildResult:
    """The bundle; seconds by stage; what verify measured, empty when it was skipped; a report for each engine.

    `reused` names what came out of the build cache, such as `graph pre` or `engine pre`.
    """

    bundle: Bundle
    stage_s: dict[str, float]
    differences: "tuple[Difference, ...]"
    reports: "tuple[EngineReport, ...]"
    reused: tuple[str, ...]


def build(
    checkpoint: str,
    output: str | Path,
    options: BuildOptions,
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> BuildResult:
    """Build a bundle from a checkpoint; `progress` is told each stage, and the builder's phases as its detail.

    Nothing stands at `output` until everything is written and verified; an old bundle there stays whole until then.
    Raises any error of the tree.
    """
    options.check()
    if options.verify:
        leaves.check_verifier()
    cache = _cache(options.cache)
    stages = Stages(len(options.stages), progress)
    differences: tuple[Difference, ...] = ()
    reports: tuple[EngineReport, ...] = ()
    with staging_folder(output, force=force) as staging:
        compiler = None
        if options.engines is not None:
            stages.enter("engine library")
            compiler = leaves.open_compiler(options.engines, options.precision, cache)
        settled = options.settled(compiler.gpus if compiler is not None else ())
        exported = leaves.export_bundle(checkpoint, staging, settled, cache, stages)
        if options.verify:
            stages.enter("verify")
            exported, differences = _verify(exported, staging, options, cache, stages)
        manifest, reused = exported.manifest, tuple(f"graph {name}" for name in exported.reused)
        if compiler is not None:
            compiled = compiler.compile(staging, manifest, stages.enter, stages.detail)
            manifest, reports = compiled.manifest, compiled.reports
            reused += tuple(f"engine {name}" for name in compiled.reused)
        if options.strip_graphs:
            manifest = strip_graphs(staging, manifest)
        stages.end()
    return BuildResult(Bundle(Path(output), manifest), stages.seconds, differences, reports, reused)


def compile_bundle(
    bundle: str | Path,
    output: str | Path,
    engines: EngineOptions,
    *,
    strip: bool = False,
    cache: Path | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> BuildResult:
    """Add engines to a bundle that was built elsewhere, without PyTorch; `output` may be the bundle itself.

    Raises BundleError, EngineError, InvalidRequest, MissingDependency.
    """
    source = Bundle.open(bundle)
    stages = Stages(1 + len(source.manifest.graphs), progress)
    stages.enter("engine library")
    compiler = leaves.open_compiler(engines, source.manifest.precision, _cache(cache))
    _check_parts(source.manifest, compiler)
    with staging_folder(output, force=force) as staging:
        source.copy(staging)
        compiled = compiler.compile(staging, source.manifest, stages.enter, stages.detail)
        manifest = strip_graphs(staging, compiled.manifest) if strip else compiled.manifest
        stages.end()
    reused = tuple(f"engine {name}" for name in compiled.reused)
    return BuildResult(Bundle(Path(output), manifest), stages.seconds, (), compiled.reports, reused)


def _cache(folder: Path | None) -> BuildCache | None:
    """One for the whole build, so that it warns once."""
    return None if folder is None else BuildCache(folder)


def _check_parts(manifest: Manifest, compiler: "Compiler") -> None:
    """Raise InvalidRequest when a GPU cannot run a part of a bundle, whose precision is in its graphs."""
    for part in PipelinePart:
        if part.graph in (graph.name for graph in manifest.graphs):
            part.check(manifest.precision_of(part.graph), compiler.gpus)


def _verify(
    exported: "Exported", staging: Path, options: BuildOptions, cache: BuildCache | None, stages: Stages
) -> "tuple[Exported, tuple[Difference, ...]]":
    """What is in the bundle at last, and how far it is from the reference; raises ParityError, NonFinite.

    A part that fails in the precision that its target takes by default is exported again in float32, with a warning.
    """
    limit = options.precision.parity_limit if options.max_error is None else options.max_error
    while True:
        manifest = exported.manifest
        try:
            with _runnable(staging, manifest) as folder:
                return exported, leaves.verify_bundle(folder, limit, manifest)
        except (ParityError, NonFinite) as error:
            part = next((part for part in PipelinePart if part.graph == error.graph), None)
            if part is None or not options.is_default(part) or manifest.precision_of(part.graph) is Precision.FP32:
                raise
            log.warning(
                "%s; %s is only the default of %s, so it is built in fp32",
                str(error).rpartition("; ")[0],
                manifest.precision_of(part.graph),
                part.option,
            )
        exported = leaves.export_part(exported, staging, part, Precision.FP32, cache, stages)
        stages.enter(f"verify with {part.graph} in {Precision.FP32}")


@contextmanager
def _runnable(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """The bundle as the CPU can run it: a bfloat16 bundle is restated in float32 that is rounded to bfloat16."""
    parts = (part.precision for part in (manifest.text, manifest.decoder) if part is not None)
    if Precision.BF16 not in (manifest.precision, *parts):
        yield folder
        return
    with TemporaryDirectory(dir=folder) as temporary:  # the machine's own place for them may be small
        yield leaves.write_rounded(folder, Path(temporary) / "rounded", manifest)
