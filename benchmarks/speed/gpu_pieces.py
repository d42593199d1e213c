"""The pieces of the GPU benchmark: each adds the missing rows to its CSV, and stops before its deadline."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from benchmarks.record import Records
from benchmarks.rivals.full_size_models import MODELS, TINY, make_checkpoint
from benchmarks.rivals.unsplit import build_unsplit
from benchmarks.speed.gpu_tables import FACTS, FP8_ATTENTION, LATENCY, PARITY, Row
from benchmarks.speed.machine import MIB, Machine
from benchmarks.speed.rows import (
    ONNXRUNTIME,
    TORCH,
    TORCH_GRAPH,
    WHOLE,
    Bench,
    Entry,
    bundle_precision,
    loaded_mib,
    unsplit_path,
)
from ilf_trt import load_ilf
from ilf_trt.assembly.conductor import build, compile_bundle
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.bench.one_graph import export_unsplit
from ilf_trt.contract.bundle import MANIFEST_FILE, REFERENCE_FILE, Bundle
from ilf_trt.contract.spec import BatchRange, Precision
from ilf_trt.contract.target import Architecture, EngineOptions, Library
from ilf_trt.errors import IlfError
from ilf_trt.model.sampling import CompileOptions
from ilf_trt.runtime.verify import Difference, difference, verify

BUILD = "gpu-build"
FIVE = "five graphs"
BUILD_KEY = ("gpu", "model", "batch", "precision", "library", "graphs")
PARITY_KEY = ("gpu", "model", "batch", "precision", "library", "what")
LATENCY_KEY = ("gpu", "model", "batch", "row", "library", "precision")
LATENCY_COLUMNS = (
    *("gpu", "model", "resolution", "batch", "row", "library", "precision", "steps", "block_forwards", "warm_ups", "n"),
    *("denoise_p50_ms", "denoise_p90_ms", "end_to_end_ms", "faster_than_eager_20", "faster_low", "faster_high"),
    *("peak_device_mib", "engine_mib", "build_s", "cold_load_s", "launch_us", "captured", "linear_share"),
    *("relative_difference", "psnr_db", "note"),
)
FACTS_S, CHECKPOINT_S, EXPORT_S, COMPILE_S, PARITY_S, BASE_S = 60.0, 60.0, 300.0, 150.0, 60.0, 60.0


class Deadline:
    """The end of this call; the first unit of work begins in any case. `left` lists the work for another call."""

    def __init__(self, minutes: float) -> None:
        self._end_s = monotonic() + 60 * minutes
        self._started = False
        self.left: list[str] = []

    def allows(self, what: str, seconds: float) -> bool:
        """Whether `what`, which takes `seconds`, may begin; if not, it goes to `left`."""
        if self._started and monotonic() + seconds > self._end_s:
            self.left.append(what)
            return False
        self._started = True
        return True


@dataclass(frozen=True, slots=True)
class Job:
    """The work of one call, and its folders. `rows` are the only rows to measure, in their order; empty for all."""

    machine: Machine
    records: Records
    command: str
    work: Path
    models: list[str]
    batches: list[int]
    precisions: list[str]
    libraries: list[str]
    rows: tuple[str, ...]
    skipped: frozenset[str]
    dtype: str
    compiled: CompileOptions
    row_s: float
    graph_parity: bool
    again: bool
    deadline: Deadline

    def find(self, name: str, row: Mapping[str, Any], key: tuple[str, ...]) -> Row | None:
        """The row of `NAME.csv` with the values of `row` in the columns `key`; None without one, and with --again."""
        values = [str(row[column]) for column in key]
        rows = [] if self.again else self.records.read(name)
        return next((other for other in rows if [other[column] for column in key] == values), None)

    def chosen(self, entries: list[Entry]) -> list[Entry]:
        """The rows to measure."""
        entries = [entry for entry in entries if entry.name not in self.skipped]
        if not self.rows:
            return entries
        chosen = [entry for entry in entries if entry.name in self.rows]
        return sorted(chosen, key=lambda entry: self.rows.index(entry.name))

    def put(self, name: str, rows: list[dict[str, Any]], key: tuple[str, ...]) -> None:
        """Record and print new rows."""
        self.records.append(name, self.command, rows, key=key)
        for row in rows:
            print(" ".join(f"{column}={value}" for column, value in row.items() if value != ""), flush=True)

    def bench(self, name: str, batch: int) -> Bench | None:
        """The rows of a model at a batch; writes its checkpoint first, and is None without the time for that."""
        folder = self.work / name
        if not (folder / "conditions.npz").is_file():
            if not self.deadline.allows(f"checkpoint {name}", CHECKPOINT_S):
                return None
            make_checkpoint(name, folder)
        return Bench(name, batch, self.work, self.machine, self.dtype, self.compiled)


def facts(job: Job) -> None:
    """The facts of the GPU, and its rates."""
    gpu = {"gpu": job.machine.gpu}
    if job.find(FACTS, gpu, ("gpu",)) is None and job.deadline.allows("facts", FACTS_S):
        rows = [*job.machine.facts(), *job.machine.rates()]
        job.put(FACTS, [{**gpu, **row} for row in rows], ("gpu", "what", "size"))


def build_bundle(job: Job, bench: Bench, precision: str) -> None:
    """The bundle of a precision, with the engines of each library that builds for this GPU."""
    path = bench.bundle(precision)
    title = f"build {bench.name} batch {bench.batch} {precision}"
    exports = {FIVE: (path / MANIFEST_FILE, _export)}
    if precision == job.precisions[0]:
        exports[WHOLE] = (unsplit_path(path, ONNXRUNTIME), _export_unsplit)
    for graphs, (file, export) in exports.items():
        if not file.is_file():
            if not job.deadline.allows(f"{title}: export of {graphs}", EXPORT_S):
                return
            try:
                export(job, bench, precision)
            except Exception as error:
                failed = exports if graphs == FIVE else [WHOLE]
                rows = [_build_row(job, bench, precision, library, g) for library in job.libraries for g in failed]
                job.put(BUILD, [{**row, "note": _refusal(job, "export", error)} for row in rows], BUILD_KEY)
                return
            job.machine.free()
        for library in job.libraries:
            _build_engines(job, bench, precision, library, graphs, title)


def _export(job: Job, bench: Bench, precision: str) -> None:
    """Export the graphs for this batch alone. The bundle's plan is short: the CPU verifies it, and no row runs it.

    The weights are random, so no difference fails the build; the parity piece records the differences.
    """
    checkpoint = job.work / bench.name
    options = BuildOptions(
        precision=bundle_precision(precision),
        batch=BatchRange(bench.batch, bench.batch, bench.batch),
        text_tokens=(MODELS | TINY)[bench.name]["text_tokens"] or 1,
        steps=2,
        feedback="first:1",
        calibration=checkpoint / "conditions.npz" if bundle_precision(precision) is Precision.FP8 else None,
        fp8_attention=precision == FP8_ATTENTION,
        device=job.machine.device,
        verify=job.graph_parity and bench.batch == 1,
        max_error=float("inf"),
    )
    build(str(checkpoint), bench.bundle(precision), options, force=True)


def _export_unsplit(job: Job, bench: Bench, precision: str) -> None:
    path = bench.bundle(precision)
    model = load_ilf(job.work / bench.name).to(getattr(torch, bundle_precision(precision).dtype))
    export_unsplit(model, Bundle.open(path, check_hashes=False).manifest, unsplit_path(path, ONNXRUNTIME))


def _build_engines(job: Job, bench: Bench, precision: str, library: str, graphs: str, title: str) -> None:
    path = bench.bundle(precision)
    row = _build_row(job, bench, precision, library, graphs)
    old_row = job.find(BUILD, row, BUILD_KEY)
    if old_row is not None and (old_row["note"] or _has_files(path, library, graphs)):
        return
    if not job.deadline.allows(f"{title}: {library}, {graphs}", 0.0 if library == ONNXRUNTIME else COMPILE_S):
        return
    try:
        if library == ONNXRUNTIME:
            row["engine_mib"] = round(loaded_mib(path, library, whole=graphs == WHOLE), 1)
        else:
            row |= _compile(job, path, Library(library), graphs)
    except (IlfError, OSError) as error:
        row["note"] = _refusal(job, library, error)
    job.put(BUILD, [row], BUILD_KEY)


def _build_row(job: Job, bench: Bench, precision: str, library: str, graphs: str) -> dict[str, Any]:
    values = (job.machine.gpu, bench.name, bench.batch, precision, library, graphs)
    empty = dict.fromkeys(("build_s", "engine_mib", "scratch_mib", "kernels", "not_as_asked", "note"), "")
    return {**dict(zip(BUILD_KEY, values, strict=True)), **empty}


def _has_files(path: Path, library: str, graphs: str) -> bool:
    """Whether the files that a library loads exist."""
    if graphs == WHOLE:
        return unsplit_path(path, library).is_file()
    if not (path / MANIFEST_FILE).is_file():
        return False
    engines = Bundle.open(path, check_hashes=False).manifest.engines
    return library == ONNXRUNTIME or library in {facts.target for facts in engines}


def _compile(job: Job, path: Path, library: Library, graphs: str) -> dict[str, Any]:
    architecture = job.machine.architecture
    rtx = library is Library.TENSORRT_RTX
    options = EngineOptions(library, (Architecture.parse(architecture),) if architecture and rtx else ())
    if graphs == WHOLE:
        manifest = Bundle.open(path, check_hashes=False).manifest
        onnx, engine = unsplit_path(path, ONNXRUNTIME), unsplit_path(path, library)
        reports: tuple[Any, ...] = (build_unsplit(manifest, onnx, engine, options),)
    else:
        reports = compile_bundle(path, path, options, force=True).reports
    return {
        "build_s": round(sum(report.build_s for report in reports), 1),
        "engine_mib": round(sum(report.engine_bytes for report in reports) / MIB, 1),
        "scratch_mib": round(max(report.scratch_bytes for report in reports) / MIB, 1),
        "kernels": sum(len(report.kernels) for report in reports),
        "not_as_asked": sum(len(report.outside) for report in reports),
    }


def parity(job: Job, bench: Bench, precision: str, library: str) -> None:
    """Compare every graph with the bundle's reference, and both plans with torch in float32 on this machine."""
    path = bench.bundle(precision)
    row: dict[str, Any] = {
        "gpu": job.machine.gpu,
        "model": bench.name,
        "batch": bench.batch,
        "precision": precision,
        "library": library,
    }
    title = f"parity {bench.name} batch {bench.batch} {precision} {library}"
    if job.find(PARITY, row, PARITY_KEY[:-1]) is not None:
        return
    empty = dict.fromkeys(("max_abs", "relative", "cosine", "limit", "note"), "")
    reason = _refusal_of_build(job, bench, precision, library, FIVE)
    if not reason and not _has_files(path, library, FIVE):
        job.deadline.left.append(f"{title}, after piece build")
        return
    if not job.deadline.allows(title, PARITY_S):
        return
    rows = []
    try:
        if reason:
            raise _NotBuilt(reason)
        differences: list[Difference] = []
        if REFERENCE_FILE in Bundle.open(path, check_hashes=False).manifest.files:
            differences += verify(path, device=job.machine.device, engine=library)[0]
        for plan in (bench.plain, bench.with_feedback):
            with bench.served(precision, library, plan) as ready:
                what = f"latents after {len(plan.steps)} steps"
                differences.append(difference(what, ready.shoot().latents, bench.reference(plan)))
        for each in differences:
            limit = bundle_precision(precision).parity_limit
            numbers = {"max_abs": f"{each.max_abs:.2e}", "relative": f"{each.relative:.2e}"}
            numbers |= {"cosine": f"{each.cosine:.7f}", "limit": str(limit)}
            rows.append({**row, **empty, "what": each.what, **numbers})
    except Exception as error:
        rows = [{**row, "what": "all", **empty, "note": _refusal(job, library, error)}]
    job.put(PARITY, rows, PARITY_KEY)
    job.machine.check()


def latency(job: Job, bench: Bench) -> None:
    """Measure every missing row in alternation with the base line."""
    shared = {"gpu": job.machine.gpu, "model": bench.name, "resolution": bench.resolution, "batch": bench.batch}
    entries = {_key(entry): entry for entry in job.chosen(bench.entries(job.libraries, job.precisions))}
    rows = {key: {**shared, "row": key[0], "library": key[1], "precision": key[2]} for key in entries}
    title = f"latency {bench.name} batch {bench.batch}"
    missing = []
    for key, row in rows.items():
        name, library, precision = key
        graphs, path = WHOLE if name == WHOLE else FIVE, bench.bundle(precision)
        if job.find(LATENCY, row, LATENCY_KEY) is not None:
            continue
        if (
            library in (TORCH, TORCH_GRAPH)
            or _refusal_of_build(job, bench, precision, library, graphs)
            or _has_files(path, library, graphs)
        ):
            missing.append(key)
        else:
            job.deadline.left.append(f"{title}: {', '.join(key)}, after piece build")
    if not missing or not job.deadline.allows(f"{title}: {len(missing)} rows", BASE_S):
        return
    with bench.base_line() as base:
        for key in missing:
            entry = entries[key]
            if not job.deadline.allows(f"{title}: {', '.join(key)}", entry.expected_s + job.row_s):
                continue
            numbers: dict[str, Any] = {"steps": len(entry.plan.steps)}
            graphs = WHOLE if entry.name == WHOLE else FIVE
            try:
                if reason := _refusal_of_build(job, bench, entry.precision, entry.library, graphs):
                    raise _NotBuilt(reason)
                numbers |= bench.measure(entry, base, job.row_s, job.records.read(FACTS))
                numbers["build_s"] = _row_of_build(job, bench, entry.precision, entry.library, graphs).get(
                    "build_s", ""
                )
            except Exception as error:
                numbers["note"] = _refusal(job, entry.library, error)
            job.put(LATENCY, [{**dict.fromkeys(LATENCY_COLUMNS, ""), **rows[key], **numbers}], LATENCY_KEY)
            job.machine.check()
            job.machine.free()


class _NotBuilt(Exception):
    """The error of a library in the build piece."""


def _row_of_build(job: Job, bench: Bench, precision: str, library: str, graphs: str) -> Row:
    """The row that the build piece recorded; empty without one."""
    values = [str(value) for value in (job.machine.gpu, bench.name, bench.batch, precision, library, graphs)]
    rows = job.records.read(BUILD)
    return next((row for row in rows if [row[column] for column in BUILD_KEY] == values), {})


def _refusal_of_build(job: Job, bench: Bench, precision: str, library: str, graphs: str) -> str:
    return _row_of_build(job, bench, precision, library, graphs).get("note", "")


def _refusal(job: Job, library: str, error: Exception) -> str:
    """One line for a row without a measurement."""
    reason = " ".join(str(error).split())[:400] or type(error).__name__
    if isinstance(error, _NotBuilt):
        return reason
    kind = "" if isinstance(error, IlfError) else f"{type(error).__name__}: "
    return f"{library} on {job.machine.gpu}: {kind}{reason}"


def _key(entry: Entry) -> tuple[str, str, str]:
    return entry.name, entry.library, entry.precision
