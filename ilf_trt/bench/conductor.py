"""Conducts a benchmark: starts a process a side, lets their rows take turns, and makes one result of what they say."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ilf_trt import leaves
from ilf_trt.contract.bundle import MANIFEST_FILE, Bundle, sha256_of
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.plan import StepPlan, make_plan
from ilf_trt.contract.progress import Progress, no_progress
from ilf_trt.contract.spec import Precision
from ilf_trt.errors import IlfError

from .agreement import PictureCheck
from .environment import governor, machine_load
from .gpu_probe import GpuProbe, GpuState
from .measured import Measured, whole_turns
from .noise import noise_of
from .observation import Observation
from .options import BenchOptions
from .result import ColdStart, Noise, Result, RowResult, Subject, Verdict
from .row import Boundary, Rival, Row, Side, rows_of
from .statistics import Interval, is_enough, ratio_interval, spread
from .worker import Worker

RUNTIME, TORCH = "ilf_trt.bench.runtime_process", "ilf_trt.bench.torch_process"
SCORES = "ilf_trt.bench.score_process"
WARM_UPS = 2  # after the first run, in which libraries capture and compile
SETTLE_S = 0.05  # for the threads of the row before, which may still spin
LONG_STEPS = 50
MOST_TURNS = 1000

Show = Callable[[tuple[RowResult, ...]], None]


class Conductor:
    """One benchmark. `write` gets every observation as it is made; `show` gets the rows so far after every turn."""

    def __init__(
        self,
        options: BenchOptions,
        command: str,
        *,
        probe: GpuProbe | None = None,
        begin: Callable[[Sequence[Observation]], None] = lambda _: None,
        write: Callable[[Observation], None] = lambda _: None,
        show: Show = lambda _: None,
        tell: Progress = no_progress,
        stop: Callable[[], bool] = lambda: False,
        earlier: Sequence[Observation] = (),
    ) -> None:
        """`probe` reads the GPU's clocks; `stop` ends the run behind its row.

        Behind the samples `earlier` of an interrupted run the turns go on; `begin` gets those of whole turns, which
        alone count.
        """
        options.check()
        self._options = options
        self._command = command
        self._begin, self._write, self._show, self._tell, self._stop = begin, write, show, tell, stop
        self._earlier: dict[tuple[str, int], list[Observation]] = defaultdict(list)
        for each in earlier:
            if each.counts:
                self._earlier[each.row, each.batch].append(each)
        self._bundle = Bundle.open(options.bundle)
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._begin_s = time.perf_counter()
        self._measured: list[Measured] = []
        self._reached: set[int] = set()
        self._workers: dict[Side, Worker] = {}
        self._loads: dict[Side, dict[str, Any]] = {}
        self._scorer: Worker | None = None
        self._awake: Side | None = None
        self._rows: tuple[Row, ...] = ()
        self._ilf_ms: dict[str, float] = {}
        self.pictures: dict[str, bytes] = {}
        """The first picture of every row as PNG, by slug; empty for latents without a decoder."""
        self._guidance_scale = 1.0
        self._probe = probe
        self._clocks: list[GpuState] = []
        self._load_before = machine_load()

    def run(self) -> Result:
        """Measure every batch; raises what loading the bundle or the checkpoint raises, before any row is measured."""
        with ExitStack() as stack, TemporaryDirectory() as name:
            folder = Path(name)
            self._start(stack)
            for batch in self._options.batches:
                if not self._stop():
                    self._measure(batch, folder)
        result = self._result(finished=not self._stop())
        self._show(result.rows)
        return result

    @property
    def _manifest(self) -> Manifest:
        return self._bundle.manifest

    def _start(self, stack: ExitStack) -> None:
        """The processes with their files loaded; the plans of the rows are the runtime's."""
        options, manifest = self._options, self._manifest
        self._tell("loading the bundle", 0, 1)
        runtime = self._workers[Side.RUNTIME] = stack.enter_context(Worker(RUNTIME, threads=options.threads))
        loaded = self._loads[Side.RUNTIME] = runtime.ask(
            "load",
            bundle=str(self._bundle.path),
            device=options.device,
            engine=options.engine,
            threads=options.threads,
            steps=options.steps,
            ilf_steps=options.ilf_steps,
            feedback=options.feedback,
            front=list(options.plans),
        )
        plans = {name: StepPlan.from_json(plan) for name, plan in loaded["plans"].items()}
        front = [StepPlan.from_json(plan) for plan in loaded["front"]]
        self._rows = rows_of(plans["plain"], plans["equal"], plans["ilf"], options.against, front)
        if options.scores:
            self._tell("loading the scores", 0, 1)
            self._scorer = stack.enter_context(Worker(SCORES, threads=options.threads))
            self._scorer.ask("load", scores=[score.value for score in options.scores], device=options.device)
        for batch in options.batches:
            rows = [Measured(row, batch, observations=list(self._earlier[row.slug, batch])) for row in self._rows]
            whole_turns(rows)
            self._measured += rows
        self._begin([one for each in self._measured for one in each.observations])
        self._guidance_scale = manifest.guidance_scale if options.guidance_scale is None else options.guidance_scale
        if any(row.side is Side.TORCH for row in self._rows):
            self._tell("loading the checkpoint", 0, 1)
            torch = self._workers[Side.TORCH] = stack.enter_context(Worker(TORCH, threads=options.threads))
            self._loads[Side.TORCH] = torch.ask(
                "load",
                checkpoint=options.checkpoint,
                bundle=str(self._bundle.path),
                device=options.device,
                precision=options.eager_precision,
                scheduler=manifest.scheduler,
                guidance=manifest.spec.guidance,
                guidance_scale=self._guidance_scale,
                base_sha256=manifest.base_sha256,
                scales=list(manifest.scales),
                threads=options.threads,
            )

    def _measure(self, batch: int, folder: Path) -> None:
        """One batch: the same inputs for both sides, every row ready and warm, then turns, then what is no time."""
        self._reached.add(batch)
        broken = self._inputs(batch, folder, self._options.seed, keep=False)
        measured = [each for each in self._measured if each.batch == batch]
        for index, each in enumerate(measured):
            self._tell(each.row.title, index, len(measured))
            if each.row.side in broken:
                each.fail(broken[each.row.side])
            elif not self._stop():
                self._open(each)
        self._take_turns(batch, [each for each in measured if not each.failed])
        ready = [each for each in measured if not each.failed and each.observations]
        for each in ready:
            with suppress(IlfError):
                each.peak_mib = self._worker(each).ask("memory")["peak_mib"]
        if self._stop():
            return
        self._compare(ready, batch, folder)
        if not self._ilf_ms and any(each.row.slug == "ilf" for each in ready):
            with suppress(IlfError):
                self._ilf_ms = self._workers[Side.RUNTIME].ask("profile", slug="ilf")

    def _inputs(self, batch: int, folder: Path, seed: int, *, keep: bool) -> dict[Side, IlfError]:
        """The same noise and conditions for both processes; `keep` keeps the rows, which are for such a batch.

        Gives the error of PyTorch's process if it cannot take them; the runtime's is raised, for it makes them.
        """
        options, path = self._options, str(folder / "inputs.npz")
        asked = {
            "batch": batch,
            "boundary": options.boundary.value,
            "guidance_scale": options.guidance_scale,
            "seed": seed,
            "prompts": list(options.prompts),
            "labels": list(options.labels),
            "size": options.size,
        }
        self._workers[Side.RUNTIME].ask("inputs", path=path, **asked)
        if Side.TORCH in self._workers:
            try:
                self._workers[Side.TORCH].ask("inputs", path=path, keep=keep)
            except IlfError as error:
                return {Side.TORCH: error}
        return {}

    def _open(self, each: Measured) -> None:
        row = each.row

        def ready(each: Measured) -> None:
            worker, loaded = self._worker(each), self._loads[row.side]
            answer = worker.ask(
                "open", slug=row.slug, plan=row.plan.as_json(), rival=row.rival and row.rival.value, ilf=row.ilf
            )
            each.library, each.block_forwards = answer.get("library", ""), answer.get("block_forwards")
            each.cold = ColdStart(worker.process_s, loaded["load_s"] + answer["load_s"], answer["first_s"])
            for number in range(WARM_UPS):
                self._shoot(each, number - WARM_UPS)

        self._ask(each, ready)

    def _take_turns(self, batch: int, measured: list[Measured]) -> None:
        """A B A B …, until every ratio is known well enough or the time is over; a turn is whole or not at all."""
        end_s = time.perf_counter() + self._options.max_s
        first = max((max(each.times_ms, default=-1) + 1 for each in measured), default=0)
        for turn in range(first, MOST_TURNS):
            if self._stop():
                return
            begin_s = time.perf_counter()
            for each in measured:
                if not each.failed:
                    self._ask(each, lambda each: self._shoot(each, turn))  # noqa: B023
            turns_left = max(int((end_s - time.perf_counter()) / max(time.perf_counter() - begin_s, 1e-9)), 0)
            rows = self._row_results()
            ratios = [row.ratio for row in rows if row.batch == batch and row.ratio is not None]
            width = max((interval.width for interval in ratios), default=0.0) / 2
            self._tell("turns", turn + 1, turn + 1 + turns_left, f"±{width:.1%} of ±{self._options.within:.1%}")
            self._show(rows)
            if not turns_left or is_enough(ratios, turn + 1, self._options.within):
                break

    def _shoot(self, each: Measured, turn: int) -> None:
        time.sleep(SETTLE_S)
        if self._awake is not each.row.side:  # the first run after the other process's is slower
            self._worker(each).ask("shoot", slug=each.row.slug)
            self._awake = each.row.side
        at_s = time.perf_counter() - self._begin_s
        answer = self._worker(each).ask("shoot", slug=each.row.slug)
        whole = self._options.boundary is Boundary.END_TO_END  # the GPU's time is that of the steps alone
        device_ms = None if whole else answer["device_ms"]
        one = Observation(each.row.slug, each.batch, turn, at_s, answer["host_ms"], device_ms)
        if one.counts:
            each.observations.append(one)
        self._write(one)
        if self._probe is not None and one.counts and (state := self._probe.read()) is not None:
            self._clocks.append(state)

    def _compare(self, measured: list[Measured], batch: int, folder: Path) -> None:
        """How near every row's latents are to eager PyTorch's; the pictures are those of the first batch."""
        chunks = max(ceil(self._options.quality_pictures / batch), 1)
        check = PictureCheck(
            self._workers,
            folder,
            self._rows[0].plan,
            self._long_plan(),
            scorer=self._scorer,
            prompts=self._options.prompts,
            batch=batch,
        )
        for chunk in range(chunks):
            self._tell("comparing pictures", chunk, chunks)
            if chunk and self._inputs(batch, folder, self._options.seed + chunk, keep=True):
                return
            check.add_chunk(measured)
        pictures = check.judge(measured, chunks)
        if batch == self._options.batches[0]:
            self.pictures.update(pictures)

    def _long_plan(self) -> StepPlan:
        manifest = self._manifest
        return make_plan(
            manifest.scheduler, LONG_STEPS, blocks=manifest.spec.blocks, loop=manifest.spec.loop, feedback="none"
        )

    def _ask(self, each: Measured, work: Callable[[Measured], None]) -> None:
        """Do work for a row; an error becomes the row's reason, and the others go on."""
        try:
            work(each)
        except IlfError as error:
            each.fail(error)

    def _worker(self, each: Measured) -> Worker:
        return self._workers[each.row.side]

    def _base(self, batch: int) -> Measured | None:
        """The base line: the first row that works."""
        return next((each for each in self._measured if each.batch == batch and not each.failed), None)

    def _ratio(self, each: Measured) -> Interval | None:
        base = self._base(each.batch)
        if base is None or each is base or each.failed:
            return None
        turns = sorted(base.times_ms.keys() & each.times_ms.keys())
        if not turns:
            return None
        return ratio_interval([base.times_ms[turn] for turn in turns], [each.times_ms[turn] for turn in turns])

    def _result(self, *, finished: bool) -> Result:
        options, manifest = self._options, self._manifest
        base = self._base(options.batches[0])
        return Result(
            command=self._command,
            started=self._started,
            finished=finished,
            subject=_subject(self._bundle),
            boundary=options.boundary,
            guidance_scale=self._guidance_scale,
            size=options.size or _pixels(manifest),
            device=self._loads[Side.RUNTIME]["device"],
            base_line=base.row.slug if base else "",
            within=options.within,
            rows=self._row_results(),
            ilf_ms=self._ilf_ms,
            fell_out=leaves.layers_outside(self._bundle) if options.device != "cpu" else (),
            noise=self._noise(),
            verdict=self._verdict(),
        )

    def _row_results(self) -> tuple[RowResult, ...]:
        return tuple(self._row_result(each) for each in self._measured if each.batch in self._reached)

    def _row_result(self, each: Measured) -> RowResult:
        row, counted = each.row, [one for one in each.observations if one.counts]
        on_gpu = [one.device_ms for one in counted if one.device_ms is not None]
        host = spread([one.host_ms for one in counted]) if counted else None
        runtime = row.side is Side.RUNTIME
        return RowResult(
            slug=row.slug,
            title=row.title,
            batch=each.batch,
            side=row.side,
            library=each.library or self._loads[row.side]["device" if runtime else "library"],
            precision=self._precision(row),
            steps=len(row.plan.steps),
            feedback_steps=sum(step.feedback for step in row.plan.steps),
            block_forwards=row.plan.block_forwards if each.block_forwards is None else each.block_forwards,
            warm_ups=1 + WARM_UPS,
            host=host,
            device=spread(on_gpu) if on_gpu else None,
            ratio=self._ratio(each),
            pictures_per_s=None if host is None else each.batch * 1000 / host.p50_ms,
            peak_mib=each.peak_mib,
            cold=each.cold,
            agreement=each.agreement,
            scores=each.scores,
            failed=each.failed,
        )

    def _precision(self, row: Row) -> str:
        if row.side is Side.RUNTIME or row.rival is Rival.ONE_GRAPH:
            return self._manifest.precision.value
        return Precision.FP32.value if row.rival is Rival.ONNX else self._options.eager_precision

    def _noise(self) -> Noise:
        base = self._base(self._options.batches[0])
        times = list(base.times_ms.values()) if base else []
        return noise_of(times, self._load_before, machine_load(), self._clocks, governor=governor())

    def _verdict(self) -> Verdict:
        """What differs between the two sides, beside what is compared."""
        if Side.TORCH not in self._workers:
            return Verdict(comparable=True)
        differs = []
        own, torch = self._manifest.precision.value, self._options.eager_precision
        if own != torch:
            differs.append(f"precision: the engines run in {own}, PyTorch in {torch}")
        if self._options.boundary is Boundary.END_TO_END and (self._manifest.text or self._manifest.decoder):
            differs.append("boundary: PyTorch's rows begin with embedded text and end with latents")
        return Verdict(comparable=not differs, differs=tuple(differs))


def _subject(bundle: Bundle) -> Subject:
    manifest = bundle.manifest
    spec = manifest.spec
    return Subject(
        bundle=bundle.path.name,
        sha256=sha256_of(bundle.path / MANIFEST_FILE),
        base_sha256=manifest.base_sha256,
        model=f"{spec.kind}, {spec.blocks} blocks, latents {' x '.join(map(str, spec.latent))}",
        precision=manifest.precision.value,
    )


def _pixels(manifest: Manifest) -> tuple[int, int]:
    _, height, width = manifest.spec.latent
    return height * manifest.picture.cell, width * manifest.picture.cell
