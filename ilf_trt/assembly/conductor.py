"""The build: export, verify, compile, put in place; each stage is loaded by name when its turn comes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from ilf_trt.assembly.build_cache import Store
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.assembly.staging import drafted
from ilf_trt.contract.bundle import Bundle, strip_graphs
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.spec import Precision
from ilf_trt.contract.target import EngineOptions


@dataclass(frozen=True, slots=True)
class BuildResult:
    """The bundle, seconds by stage, what verify measured (None when it was skipped), and what the engines are.

    `reports` has one for each engine; `reused` names what came out of the build cache, as `graph pre`, `engine pre`.
    """

    bundle: Bundle
    stage_s: dict[str, float]
    differences: tuple[Any, ...]
    table: Any
    reports: tuple[Any, ...]
    reused: tuple[str, ...]


def build(
    checkpoint: str,
    output: str | Path,
    options: BuildOptions,
    *,
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
    tell: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> BuildResult:
    """Build a bundle from a checkpoint; `progress` is told each stage's name as it begins, `tell` the builder's phases.

    Nothing stands at `output` until everything is written and verified; an old bundle there stays whole until then.
    Raises any error of the tree.
    """
    options.check()
    clock = _Clock(progress)
    differences: tuple[Any, ...] = ()
    table = None
    with drafted(output, force=force) as draft:
        compiler = None
        if options.engines is not None:
            clock.enter("engine library")
            compiler = _compiler(options.engines, options.precision, options.cache)
        exported = import_module("ilf_trt.export.bundle").export_bundle(checkpoint, draft, options, clock.enter)
        manifest, reused = exported.manifest, tuple(f"graph {name}" for name in exported.reused)
        if options.verify:
            clock.enter("verify")
            checks = import_module("ilf_trt.runtime.verify")
            with _runnable(draft, manifest) as subject:
                differences, _ = checks.verify(subject)
            limit = options.precision.parity_limit if options.max_error is None else options.max_error
            checks.check(differences, limit)
            table = checks.table(differences)
        reports: tuple[Any, ...] = ()
        if compiler is not None:
            compiled = compiler.compile(draft, manifest, clock.enter, tell)
            manifest, reports = compiled.manifest, compiled.reports
            reused += tuple(f"engine {name}" for name in compiled.reused)
        if options.strip_graphs:
            manifest = strip_graphs(draft, manifest)
        clock.enter("")
    return BuildResult(Bundle(Path(output), manifest), clock.stage_s, differences, table, reports, reused)


def compile_bundle(
    bundle: str | Path,
    output: str | Path,
    engines: EngineOptions,
    *,
    strip: bool = False,
    cache: Path | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
    tell: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> BuildResult:
    """Add engines to a bundle that was built elsewhere, without PyTorch; `output` may be the bundle itself.

    Raises BundleError, EngineError, InvalidRequest, MissingDependency.
    """
    clock = _Clock(progress)
    clock.enter("engine library")
    opened = Bundle.open(bundle)
    compiler = _compiler(engines, opened.manifest.precision, cache)
    with drafted(output, force=force) as draft:
        opened.copy(draft)
        compiled = compiler.compile(draft, opened.manifest, clock.enter, tell)
        manifest = strip_graphs(draft, compiled.manifest) if strip else compiled.manifest
        clock.enter("")
    reused = tuple(f"engine {name}" for name in compiled.reused)
    return BuildResult(Bundle(Path(output), manifest), clock.stage_s, (), None, compiled.reports, reused)


def _compiler(engines: EngineOptions, precision: Precision, cache: Path | None) -> Any:
    module = import_module("ilf_trt.engines.compiler")
    return module.Compiler.open(engines, precision, None if cache is None else Store(cache))


@contextmanager
def _runnable(draft: Path, manifest: Manifest) -> Iterator[Path]:
    """The bundle as the CPU can run it: a bfloat16 one is restated in float32 that is rounded to bfloat16."""
    beside = (part.precision for part in (manifest.text, manifest.decoder) if part is not None)
    if Precision.BF16 not in (manifest.precision, *beside):
        yield draft
        return
    with TemporaryDirectory() as folder:
        yield import_module("ilf_trt.export.rounding").write_rounded(draft, Path(folder) / "rounded", manifest)


class _Clock:
    """Seconds of each stage."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.stage_s: dict[str, float] = {}
        self._progress = progress
        self._began = perf_counter()
        self._current = ""

    def enter(self, stage: str) -> None:
        """End the current stage and begin `stage`, or only end it for an empty name."""
        now = perf_counter()
        if self._current:
            self.stage_s[self._current] = now - self._began
        self._began, self._current = now, stage
        if stage:
            self._progress(stage)
