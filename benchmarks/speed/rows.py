"""One model at one batch: every way to run it, timed in alternation with eager PyTorch and compared with it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.rivals import torch_engine
from benchmarks.rivals.full_size_models import MODELS, PIXELS, TINY, make_backbone, make_conditions
from benchmarks.rivals.unsplit import opened
from benchmarks.speed.gpu_tables import FP8_ATTENTION, ILF_ROW, TORCH_ILF_ROW
from benchmarks.speed.hoisting import linear_flop
from benchmarks.speed.machine import DTYPES, MIB, Machine, Shot, measured_rate
from benchmarks.speed.stand_ins import lane_of
from ilf_trt import ILFModel, attach, load_ilf
from ilf_trt.bench.inputs import decibels
from ilf_trt.bench.one_graph import UNSPLIT, UNSPLIT_FILE
from ilf_trt.bench.rivals import CACHED_EVERY, Eager, Run, cached_blocks
from ilf_trt.bench.statistics import median_interval, spread
from ilf_trt.contract.bundle import ENGINE_FOLDER, GRAPH_FOLDER, Bundle
from ilf_trt.contract.plan import StepPlan, cached_block_forwards, make_plan
from ilf_trt.contract.spec import ModelSpec, Precision
from ilf_trt.contract.target import Library
from ilf_trt.errors import InvalidRequest
from ilf_trt.model.checkpoint import read_checkpoint
from ilf_trt.model.sampling import CompileOptions
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.trajectory import RunOptions
from ilf_trt.runtime.verify import difference

STEPS, FEEDBACK_STEPS, FEEDBACK = 20, 10, "outer:2"
GUIDANCE_SCALE = 4.5
WARM_UPS = 2  # after the first run, in which the libraries capture and torch.compile compiles
MIN_REPEATS, MAX_REPEATS = 5, 30
TORCH, TORCH_GRAPH, ONNXRUNTIME = "torch", torch_engine.NAME, "onnxruntime"
BASE_LINE = "eager diffusers"
ENGINE_S, EAGER_S, COMPILED_S = 45.0, 30.0, 180.0
TERA = 1e12

EAGER_EQUAL = "eager diffusers at equal cost"
COMPILED = "torch.compile"
CACHED = "eager, middle blocks cached (the paper's)"
CACHE_DIT = "eager, cache-dit"
WHOLE, SPLIT = "one graph a step", "five graphs"
EAGER_ILF, COMPILED_ILF = "eager ILF", "torch.compile ILF"
CAPTURED, CAPTURED_EQUAL = "captured plain steps by torch", "captured plain steps by torch at equal cost"

SLUGS = {
    "eager": BASE_LINE,
    "eager-equal": EAGER_EQUAL,
    "compiled": COMPILED,
    "cached": CACHED,
    "cache-dit": CACHE_DIT,
    "eager-ilf": EAGER_ILF,
    "compiled-ilf": COMPILED_ILF,
    "captured": CAPTURED,
    "captured-equal": CAPTURED_EQUAL,
    "captured-ilf": TORCH_ILF_ROW,
    "one-graph": WHOLE,
    "five-graphs": SPLIT,
    "ilf": ILF_ROW,
}
"""Short names of the rows, for a command line."""


def row_named(text: str) -> str:
    """The row with this name or short name; raises InvalidRequest with the list for another one."""
    if text not in {*SLUGS, *SLUGS.values()}:
        known = ", ".join(f"{slug} ({name})" for slug, name in SLUGS.items())
        raise InvalidRequest(f"row {text!r} is unknown; the rows are {known}")
    return SLUGS.get(text, text)


@dataclass(frozen=True, slots=True)
class Ready:
    """A loaded row: a generation, the block forwards of the last one, times by graph, and the size of its files.

    A row with times by graph has the dimensions of its graphs too.
    """

    shoot: Callable[[], Shot]
    block_forwards: Callable[[], int]
    graph_ms: Callable[[], Mapping[str, float]] | None = None
    engine_mib: float | None = None
    spec: ModelSpec | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A row, not loaded yet; `expected_s` is the most seconds that it should take."""

    name: str
    library: str
    precision: str
    plan: StepPlan
    expected_s: float
    open: Callable[[], AbstractContextManager[Ready]]


class Bench:
    """All rows of one model at one batch, with guidance."""

    def __init__(
        self, name: str, batch: int, work: Path, machine: Machine, dtype: str, compiled: CompileOptions
    ) -> None:
        """Read the facts of the checkpoint `name` under `work`; raises CheckpointError if it is missing."""
        self.name, self.batch = name, batch
        self.machine = machine
        self.dtype = dtype
        self._work = work
        self._compiled = compiled
        checkpoint = read_checkpoint(work / name)
        self._scheduler = checkpoint.scheduler_config()
        blocks, side = int(checkpoint.config["num_layers"]), int(checkpoint.config["sample_size"])

        def plan(steps: int, feedback: str) -> StepPlan:
            return make_plan(self._scheduler, steps, blocks=blocks, loop=checkpoint.loop, feedback=feedback)

        self.resolution = side * PIXELS
        self.plain, self.with_feedback = plan(STEPS, "none"), plan(FEEDBACK_STEPS, FEEDBACK)
        self.equal = plan(self.with_feedback.equal_steps, "none")
        self.conditions = make_conditions(name, batch)
        shape = (batch, int(checkpoint.config["in_channels"]), side, side)
        self.noise = np.random.default_rng(1).standard_normal(shape, np.float32)

    @cached_property
    def model(self) -> ILFModel:
        """The model in float32 on the CPU."""
        return load_ilf(self._work / self.name).float()

    @cached_property
    def eager(self) -> Eager:
        """The rivals in torch."""
        return Eager(self.model, self._scheduler, GUIDANCE_SCALE, self.machine.device, DTYPES[self.dtype])

    def bundle(self, precision: str) -> Path:
        return bundle_path(self._work, self.name, self.batch, precision)

    def reference(self, plan: StepPlan) -> NDArray[np.float32]:
        """The latents of a plan from eager torch in whole float32 on the same device; a file keeps them."""
        feedback_steps = sum(step.feedback for step in plan.steps)
        path = self._work / f"{self.name}-b{self.batch}-{len(plan.steps)}-{feedback_steps}.npy"
        if not path.is_file():
            np.save(path, self.eager.reference(plan, *self._tensors()).numpy())
            self.machine.free()
        return np.load(path)

    def entries(self, libraries: list[str], precisions: list[str]) -> list[Entry]:
        """Every row, the base line first."""
        dtype, compiled = self.dtype, self._compiled

        def torch_row(name: str, plan: StepPlan, runner: Callable[[], AbstractContextManager[Run]], s: float) -> Entry:
            return Entry(name, TORCH, dtype, plan, s, lambda: self._torch(runner(), plan.block_forwards))

        rows = [
            torch_row(BASE_LINE, self.plain, lambda: self.eager.plain(self.plain), EAGER_S),
            torch_row(EAGER_EQUAL, self.equal, lambda: self.eager.plain(self.equal), EAGER_S),
            torch_row(COMPILED, self.plain, lambda: self.eager.plain(self.plain, compiled=compiled), COMPILED_S),
            Entry(CACHED, TORCH, dtype, self.plain, EAGER_S, self._cached),
            Entry(CACHE_DIT, TORCH, dtype, self.plain, EAGER_S, self._cache_dit),
            torch_row(EAGER_ILF, self.with_feedback, lambda: self.eager.ilf(self.with_feedback), EAGER_S),
            torch_row(
                COMPILED_ILF,
                self.with_feedback,
                lambda: self.eager.ilf(self.with_feedback, compiled=compiled),
                COMPILED_S,
            ),
            *(
                Entry(name, TORCH_GRAPH, dtype, plan, EAGER_S, _later(self._captured, plan))
                for name, plan in (
                    (CAPTURED, self.plain),
                    (CAPTURED_EQUAL, self.equal),
                    (TORCH_ILF_ROW, self.with_feedback),
                )
            ),
        ]
        first = precisions[0]
        for library in libraries:
            ways: list[tuple[str, str, StepPlan, Callable[..., AbstractContextManager[Ready]]]] = [
                (WHOLE, first, self.plain, self._whole),
                (SPLIT, first, self.plain, self.served),
                *((ILF_ROW, precision, self.with_feedback, self.served) for precision in precisions),
            ]
            for name, precision, plan, way in ways:
                rows.append(Entry(name, library, precision, plan, ENGINE_S, _later(way, precision, library, plan)))
        return rows

    @contextmanager
    def base_line(self) -> Iterator[Callable[[], Shot]]:
        """The first row, loaded and warm."""
        with self.entries([], ["fp16"])[0].open() as ready:
            for _ in range(1 + WARM_UPS):
                ready.shoot()
            yield ready.shoot

    def measure(
        self, entry: Entry, base: Callable[[], Shot], seconds: float, rates: list[dict[str, str]]
    ) -> dict[str, Any]:
        """Load a row, time it in alternation with the base line for about `seconds`, and compare its latents."""
        machine = self.machine
        machine.free()
        before = machine.used_mib()
        start_s = perf_counter()
        with entry.open() as ready:
            shot = ready.shoot()
            cold_load_s = perf_counter() - start_s
            for _ in range(WARM_UPS):
                shot = ready.shoot()
            used = machine.used_mib()
            peak_mib = None if before is None or used is None else used - before
            pair_s = (shot.end_to_end_ms + base().end_to_end_ms) / 1000
            repeats = min(max(round(seconds / max(pair_s, 1e-6)), MIN_REPEATS), MAX_REPEATS)
            pairs = [(base(), ready.shoot()) for _ in range(repeats)]
            shots = [shot for _, shot in pairs]
            share = self._linear_share(entry, ready, rates)
            block_forwards = ready.block_forwards()
        ratios = [first.denoise_ms / second.denoise_ms for first, second in pairs]
        faster, denoise = median_interval(ratios), spread([shot.denoise_ms for shot in shots])
        launches = [shot.launch_us for shot in shots if shot.launch_us is not None]
        latents = shots[-1].latents
        psnr_db = decibels(latents, self.reference(self.plain))
        return {
            "block_forwards": block_forwards,
            "warm_ups": 1 + WARM_UPS,
            "n": repeats,
            "denoise_p50_ms": _digits(denoise.p50_ms),
            "denoise_p90_ms": _digits(denoise.p90_ms),
            "end_to_end_ms": _digits(spread([shot.end_to_end_ms for shot in shots]).p50_ms),
            "faster_than_eager_20": round(faster.median, 3),
            "faster_low": round(faster.low, 3),
            "faster_high": round(faster.high, 3),
            "peak_device_mib": "" if peak_mib is None else round(peak_mib),
            "engine_mib": "" if ready.engine_mib is None else round(ready.engine_mib, 1),
            "cold_load_s": round(cold_load_s, 2),
            "launch_us": round(median_interval(launches).median, 1) if launches else "",
            "captured": {None: "", True: "yes", False: "no"}[shots[-1].captured],
            "linear_share": "" if share is None else round(share, 3),
            "relative_difference": f"{difference(entry.name, latents, self.reference(entry.plan)).relative:.1e}",
            "psnr_db": "" if psnr_db is None else round(psnr_db, 2),
        }

    def _linear_share(self, entry: Entry, ready: Ready, rates: list[dict[str, str]]) -> float | None:
        """The rate of the Linears over the time of all graphs, as a share of the measured rate of square products."""
        rate = measured_rate(rates, self.machine.gpu, bundle_precision(entry.precision))
        if ready.graph_ms is None or ready.spec is None or rate is None:
            return None
        graph_ms = sum(ready.graph_ms().values())
        if not graph_ms:
            return None
        with torch.device("meta"):
            model = attach(make_backbone(self.name), ready.spec.loop)
        return linear_flop(model, ready.spec, entry.plan, self.batch) / (graph_ms / 1000) / (rate * TERA)

    @contextmanager
    def _torch(self, opening: AbstractContextManager[Run], block_forwards: int) -> Iterator[Ready]:
        conditions, noise = self._tensors()
        with opening as run:
            yield Ready(lambda: self.machine.shoot(run, conditions, noise), lambda: block_forwards)

    def _cached(self) -> AbstractContextManager[Ready]:
        blocks = self.plain.blocks
        costs = cached_block_forwards(blocks, STEPS, cached=cached_blocks(blocks), every=CACHED_EVERY)
        return self._torch(self.eager.cached(self.plain), sum(costs))

    @contextmanager
    def _cache_dit(self) -> Iterator[Ready]:
        conditions, noise = self._tensors()
        with self.eager.cache_dit(self.plain) as (run, block_forwards):
            yield Ready(lambda: self.machine.shoot(run, conditions, noise), block_forwards)

    @contextmanager
    def served(self, precision: str, library: str, plan: StepPlan) -> Iterator[Ready]:
        """A bundle in one of its libraries."""
        path = self.bundle(precision)
        with Pipeline.load(path, device=self.machine.device, engine=library, sessions=1) as pipe:
            yield self._ready(pipe, plan, loaded_mib(path, library, whole=False))

    @contextmanager
    def _captured(self, plan: StepPlan) -> Iterator[Ready]:
        """The runtime's trajectory of a plan as one CUDA graph, with torch in the place of an engine library."""
        model = torch_engine.Served(
            self.model,
            plan,
            self._scheduler,
            Precision(self.dtype),
            self.batch,
            (MODELS | TINY)[self.name]["text_tokens"] or 1,
            GUIDANCE_SCALE,
        )
        with lane_of(self.machine) as lane, torch_engine.opened(model, lane) as pipe:
            yield self._ready(pipe, plan, None)

    def _ready(self, pipe: Pipeline, plan: StepPlan, engine_mib: float | None) -> Ready:
        def sample(*, profile: bool = False) -> Any:
            return pipe.generate(
                latents=self.noise, plan=plan, guidance_scale=GUIDANCE_SCALE, profile=profile, **self.conditions
            )

        def shoot() -> Shot:
            result = sample()
            return _shot(result.latents, result.timings)

        return Ready(
            shoot,
            lambda: plan.block_forwards,
            lambda: sample(profile=True).timings.graph_ms,
            engine_mib,
            pipe.manifest.spec,
        )

    @contextmanager
    def _whole(self, precision: str, library: str, plan: StepPlan) -> Iterator[Ready]:
        bundle = Bundle.open(self.bundle(precision))
        whole = unsplit_path(bundle.path, library)
        of_library = None if library == ONNXRUNTIME else Library(library)
        spec = bundle.manifest.spec
        rows = spec.conditioning.rows(self.conditions, guided=spec.guidance)
        with opened(bundle, plan, self.batch, whole, device=self.machine.device, library=of_library) as trajectory:

            def run(*, profile: bool) -> tuple[Any, Any]:
                return trajectory.run(self.noise, rows, GUIDANCE_SCALE, RunOptions(profile=profile))

            yield Ready(
                lambda: _shot(*run(profile=False)),
                lambda: plan.block_forwards,
                lambda: run(profile=True)[1].graph_ms,
                loaded_mib(bundle.path, library, whole=True),
                spec,
            )

    def _tensors(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {name: torch.from_numpy(value) for name, value in self.conditions.items()}, torch.from_numpy(self.noise)


def bundle_precision(name: str) -> Precision:
    """The precision to build a bundle in and that of its Linears; `fp8-attention` is FP8 with attention in FP8 too."""
    return Precision.FP8 if name == FP8_ATTENTION else Precision(name)


def bundle_path(work: Path, name: str, batch: int, precision: str) -> Path:
    return work / f"{name}-b{batch}-{precision}.ilf"


def unsplit_path(bundle: Path, library: str) -> Path:
    """The unsplit graph of a bundle, or its engine, in a folder next to the bundle."""
    folder = bundle.with_suffix("") / UNSPLIT
    return folder / (UNSPLIT_FILE if library == ONNXRUNTIME else f"{library}.engine")


def loaded_mib(bundle: Path, library: str, *, whole: bool) -> float:
    """Size of the files that a library loads: those of a bundle, or those of its unsplit graph."""
    if whole:
        file = unsplit_path(bundle, library)
        return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")) / MIB
    folder = f"{GRAPH_FOLDER}/" if library == ONNXRUNTIME else f"{ENGINE_FOLDER}/{library}/"
    files = Bundle.open(bundle, check_hashes=False).manifest.files
    return sum(facts.size_bytes for name, facts in files.items() if name.startswith(folder)) / MIB


def _shot(latents: NDArray[np.float32], timings: Any) -> Shot:
    denoise_ms = timings.total_ms if timings.device_ms is None else timings.device_ms
    captured = None if timings.device_ms is None else timings.captured
    return Shot(latents, denoise_ms, timings.total_ms, timings.launch_us, captured)


def _later(
    way: Callable[..., AbstractContextManager[Ready]], *values: Any
) -> Callable[[], AbstractContextManager[Ready]]:
    return lambda: way(*values)


def _digits(value: Any) -> float:
    return float(f"{float(value):.4g}")
