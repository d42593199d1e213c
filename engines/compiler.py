"""Compiles the graphs of a bundle for one target: takes engines from the build cache, builds the others."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ilf_trt.assembly.build_cache import BuildCache, entry_note, take_or_make
from ilf_trt.contract.bundle import ENGINE_FOLDER, graph_file, write_manifest
from ilf_trt.contract.document import DocumentError, as_type, read_json
from ilf_trt.contract.manifest import EngineFacts, Manifest
from ilf_trt.contract.ports import Graph
from ilf_trt.contract.progress import Progress, no_progress
from ilf_trt.contract.spec import Precision
from ilf_trt.contract.target import Architecture, EngineOptions, Library, check_precision
from ilf_trt.errors import BundleError, InvalidRequest

from .builder import BuildRequest
from .job import ask
from .library import LibraryFacts
from .profiles import profile_of
from .report import EngineReport

RECIPE = 3  # raise this number when the same graph must become another engine or another report


@dataclass(frozen=True, slots=True)
class CompileResult:
    """The manifest with the engines, a report for each graph, and the names of the graphs from the build cache."""

    manifest: Manifest
    reports: tuple[EngineReport, ...]
    reused: tuple[str, ...]


class Compiler:
    """One engine library on this machine that builds for `gpus`."""

    def __init__(self, options: EngineOptions, facts: LibraryFacts, cache: BuildCache | None) -> None:
        self._options = options
        self._facts = facts
        self._cache = cache

    @classmethod
    def open(cls, options: EngineOptions, precision: Precision, cache: BuildCache | None) -> "Compiler":
        """Check what the library can build, before the export begins.

        Raises InvalidRequest for a GPU or a precision that the library cannot build for, MissingDependency without the
        library, EngineError without the GPU that TensorRT needs.
        """
        options.check()
        facts = LibraryFacts.from_json(ask(options.library, {"do": "probe", "library": options.library.value}))
        for gpu in options.gpus:
            if gpu not in facts.gpus:
                known = ", ".join(map(str, facts.gpus))
                hopper = (
                    "; Hopper and other data centre GPUs need --target tensorrt" if gpu.number in (90, 100, 103) else ""
                )
                raise InvalidRequest(f"{options.library} {facts.version} has no target {gpu}; it has {known}{hopper}")
        check_precision(precision, options.gpus or facts.gpus)
        return cls(options, facts, cache)

    @property
    def gpus(self) -> tuple[Architecture, ...]:
        """The architectures that the engines run on."""
        return self._options.gpus or self._facts.gpus

    def compile(
        self,
        folder: Path,
        manifest: Manifest,
        progress: Callable[[str], None],
        tell: Progress = no_progress,
    ) -> CompileResult:
        """Write an engine and a report for every graph into `folder`, and a new manifest.

        Each engine calls `progress("engine GRAPH")` as it begins, and the builder's phases call `tell`. Engines of this
        library are replaced; engines of another library stay. Raises EngineError, BundleError.
        """
        folder = folder.resolve()
        shutil.rmtree(folder / ENGINE_FOLDER / self._options.library, ignore_errors=True)
        engines, reports, reused = [], [], []
        for graph in manifest.graphs:
            progress(f"engine {graph.name}")
            facts, report, cached = self._engine(folder, manifest, graph, tell)
            engines.append(facts)
            reports.append(report)
            reused += [graph.name] if cached else []
        others = tuple(facts for facts in manifest.engines if facts.target != self._options.library)
        manifest = write_manifest(folder, replace(manifest, engines=(*others, *engines)))
        return CompileResult(manifest, tuple(reports), tuple(reused))

    def _engine(
        self, folder: Path, manifest: Manifest, graph: Graph, tell: Progress
    ) -> tuple[EngineFacts, EngineReport, bool]:
        request = self._request(folder, manifest, graph)
        key = self._key(manifest, request)
        engine = Path(request.engine)
        report = engine.with_suffix(".json")
        files = {"engine": engine, "report": report}
        note = entry_note(
            manifest.spec,
            graph.name,
            manifest.precision_of(graph.name),
            target=self._options.library.value,
            version=self._facts.version,
            gpus=tuple(map(str, self.gpus)),
        )
        cached = take_or_make(self._cache, key, files, note, partial(self._build, request, report, tell))
        facts = EngineFacts(
            graph=graph.name,
            target=self._options.library.value,
            file=engine.relative_to(folder).as_posix(),
            report=report.relative_to(folder).as_posix(),
            library_version=self._facts.version,
            gpus=tuple(str(gpu) for gpu in self.gpus),
            gpu_name=self._facts.gpu_name,
            driver=self._facts.driver,
            any_gpu_of_architecture=self._options.any_gpu_of_architecture,
            key=key,
        )
        return facts, read_report(report), cached

    def _build(self, request: BuildRequest, report: Path, tell: Progress) -> None:
        report.parent.mkdir(parents=True, exist_ok=True)

        def build(timing_cache: Path | None) -> None:
            full = replace(request, timing_cache=str(timing_cache) if timing_cache else None)
            answer = ask(self._options.library, {"do": "build", "engine": full.as_json()}, tell)
            report.write_text(json.dumps(answer, indent=1) + "\n")

        # TensorRT-RTX measures no kernels during a build, so its timing cache would stay empty.
        if self._cache is None or not self._options.timing_cache or self._options.library is Library.TENSORRT_RTX:
            build(None)
            return
        content = [self._facts.version, self._facts.gpu_name, self._facts.driver, *map(str, self.gpus)]
        with self._cache.timings(f"{_digest(content)[:32]}.cache") as path:
            build(path)

    def _request(self, folder: Path, manifest: Manifest, graph: Graph) -> BuildRequest:
        options = self._options
        products = manifest.fp8.products if manifest.fp8 else ()
        onnx = folder / graph_file(graph.name)
        if not onnx.is_file():
            raise BundleError(f"{folder} has no graph {graph.name!r} to compile; build the bundle again")
        return BuildRequest(
            library=options.library.value,
            graph=graph.name,
            onnx=str(onnx),
            engine=str(folder / ENGINE_FOLDER / options.library / f"{graph.name}.engine"),
            precision=manifest.precision_of(graph.name).value,
            expected=tuple(name for name in products if manifest.spec.graph_of_linear(name) == graph.name),
            profile=profile_of(
                graph, manifest.batch, manifest.spec, times=len(manifest.plan.times), decoder=manifest.decoder
            ),
            gpus=tuple(str(gpu) for gpu in options.gpus),
            builder_level=options.builder_level,
            workspace_bytes=options.workspace_bytes,
            any_gpu_of_architecture=options.any_gpu_of_architecture,
            timing_cache=None,
        )

    def _key(self, manifest: Manifest, request: BuildRequest) -> str:
        """A hash of everything that the engine depends on; graph and weights count by content, never by path."""
        paths = {"onnx", "engine", "timing_cache"}
        name = graph_file(request.graph)
        return _digest(
            {
                "recipe": RECIPE,
                "files": {path: facts.sha256 for path, facts in manifest.files.items() if path.startswith(name)},
                "request": {field: value for field, value in request.as_json().items() if field not in paths},
                "library": [self._facts.version, self._facts.gpu_name, self._facts.driver, *map(str, self.gpus)],
            }
        )


def read_report(path: Path) -> EngineReport:
    """The report of an engine; raises BundleError if the file is no report."""
    try:
        return as_type(read_json(path), EngineReport)
    except DocumentError as error:
        raise BundleError(f"{path} {error.reason}; compile the bundle again") from error


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
